from pathlib import Path

import pytest
from small_autoencoders import prepare


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder with models and pictures. Tests put their runs into it."""
    folder = tmp_path_factory.mktemp("autoencoders")
    prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def no_pretrained_networks(monkeypatch):
    """Metrics that need a download are reported as missing."""
    from stand_ins import use

    from dcae_fast.evaluation import networks

    monkeypatch.setattr(networks, "LOADERS", use("fid"))
