from pathlib import Path

import pytest
from small_pictures import save_pictures

from dcae_fast.data.store import ShardStore


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    save_pictures(folder)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(ShardStore, "unit", 3)
