from pathlib import Path

import pytest

from dcae_fast.ops import _plans


@pytest.fixture
def empty_cache(monkeypatch, tmp_path) -> Path:
    """The folder of plans on disk, which is empty; no plans are known in memory either."""
    monkeypatch.setenv("DCAE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_plans, "_plans", {})
    return tmp_path
