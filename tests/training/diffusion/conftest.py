from pathlib import Path

import pytest
from small_training import CPU, RECIPE, run_in, save_latents

from dcae_fast.training.diffusion.task import train


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder with latents and, in "whole", a training that was never interrupted. Tests put their runs into it."""
    folder = tmp_path_factory.mktemp("training")
    save_latents(folder / "latents")
    train(RECIPE, run_in(folder / "whole"), CPU)
    return folder
