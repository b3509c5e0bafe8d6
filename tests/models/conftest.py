"""A fixture for the tests of checkpoints."""

from pathlib import Path

import pytest
from small_checkpoints import build


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model in the original layout."""
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"
