from pathlib import Path

import pytest
from PIL import Image
from stand_ins import use

from dcae_fast import images
from dcae_fast.evaluation import networks

SIZES = {"a.png": (64, 64), "b.png": (150, 70), "c.jpg": (40, 50), "d.png": (64, 90), "e.png": (100, 100)}


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder with the bundled photograph and five crops of the photograph."""
    folder = tmp_path_factory.mktemp("photographs")
    with Image.open(images.demo_photograph()) as photograph:
        photograph.save(folder / "whole.png")
        for number, (name, (width, height)) in enumerate(SIZES.items()):
            left, top = 40 * number, 25 * number
            photograph.crop((left, top, left + width, top + height)).convert("RGB").save(folder / name)
    return folder


@pytest.fixture
def stand_ins(monkeypatch):
    """stand_ins(*names) makes only these networks available, as small functions; without names, all."""

    def replace(*names: str) -> None:
        for name, loader in use(*names).items():
            monkeypatch.setitem(networks.LOADERS, name, loader)

    replace()
    return replace
