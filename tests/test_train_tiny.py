"""The training of the tiny autoencoder: its pictures, and a rehearsal of the complete program."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dcae_fast.models import DCAE

pytest.importorskip("sklearn", reason="some photographs are scikit-learn's: pip install 'dcae_fast[train]'")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def photographs(monkeypatch):
    """The example programs, with three photographs that need no scikit-image; the first is held out."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import tiny_photographs
    import train_tiny

    seen = tuple(each for each in tiny_photographs.PHOTOGRAPHS if each.package == "sklearn")
    chelsea = replace(tiny_photographs.PHOTOGRAPHS[0], package="dcae_fast", path="assets/photographs/chelsea.png")
    for module in (tiny_photographs, train_tiny):
        monkeypatch.setattr(module, "PHOTOGRAPHS", (chelsea, *seen))


def test_pictures(tmp_path):
    from tiny_photographs import write_held_out, write_pictures

    for name in ("one", "two"):
        write_pictures(tmp_path / name, 40, 18, CPU)
    files = sorted((tmp_path / "one").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.jpg" for number in range(18)]
    assert all(file.read_bytes() == (tmp_path / "two" / file.name).read_bytes() for file in files)
    assert len({file.read_bytes() for file in files}) == 18
    with Image.open(files[0]) as picture:
        assert picture.size == (40, 40)
    write_held_out(tmp_path / "held-out")
    assert [file.name for file in (tmp_path / "held-out").iterdir()] == ["chelsea.png"]


def test_the_program(tmp_path, monkeypatch, capsys):
    import train_tiny as program

    out, rehearsed = tmp_path / "model", program.rehearsed
    monkeypatch.setattr(program, "COMMON", f"{program.COMMON} --workers 0")
    monkeypatch.setattr(program, "rehearsed", lambda phase: replace(rehearsed(phase), pictures=4, batch=2))
    argv = ["train", "--out", str(out), "--steps", "4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    program.main()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (out / "README.md").read_text()
    assert card in capsys.readouterr().out
    for phase in program.PHASES:
        assert re.search(rf"^\| {phase.recipe} \| \d \| 2 of \d+ px \| [\d.]+ \| [\d.]+ \|$", card, re.M)
        assert (tmp_path / "model-training" / phase.recipe / "model" / "README.md").is_file()
    assert "| chelsea | held out | 448x288 |" in card and "CC BY 2.0" in card
    model = DCAE.from_pretrained(out)
    assert model.config == replace(DCAE.from_pretrained("dc-ae-tiny").config, scaling_factor=model.scaling_factor)
    with pytest.raises(SystemExit):  # the folder exists now
        program.main()
