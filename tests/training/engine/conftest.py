from pathlib import Path

import pytest
from two_networks import RECIPE, TwoNetworks, run_in

from dcae_fast.training.engine.loop import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a training that was never interrupted. No test changes it."""
    folder = tmp_path_factory.mktemp("engine") / "finished"
    train(TwoNetworks(RECIPE, run_in(folder)))
    return folder
