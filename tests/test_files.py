"""Files are complete or absent, and a failed write names the file, whichever library writes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dcae_fast.files import WriteError, leftovers, save_npy, writing, written_atomically

LARGE = torch.rand(64, 64, 3)
WRITERS = {
    "safetensors": lambda path: save_file({"x": LARGE}, path),
    "torch": lambda path: torch.save(LARGE, path),
    "numpy": lambda path: np.save(path.open("wb"), LARGE.numpy()),
    "pillow": lambda path: Image.fromarray((LARGE * 255).byte().numpy()).save(path, format="PNG"),
    "python": lambda path: path.write_bytes(LARGE.numpy().tobytes()),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit(tmp_path, full_disk, writer):
    path = tmp_path / "result"
    path.write_text("the former one")
    with pytest.raises(WriteError, match=r"/result: not written: .*(File too large|disk full)"):
        with written_atomically(path) as temporary:
            WRITERS[writer](temporary)
    assert path.read_text() == "the former one" and list(tmp_path.iterdir()) == [path]


def test_an_array_that_does_not_fit(tmp_path, full_disk):
    """Also a small array, whose end numpy's own file writing loses without an error."""
    for count in (4000, 40000):
        with pytest.raises(WriteError, match="/x.npy: not written: File too large"):
            save_npy(tmp_path / "x.npy", np.zeros(count, np.uint8))
        assert not list(tmp_path.iterdir())
    save_npy(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    assert np.array_equal(np.load(tmp_path / "x.npy"), [[0, 1, 2], [3, 4, 5]])


def test_a_folder_that_is_absent(tmp_path):
    with pytest.raises(WriteError, match="/absent/result: not written: No such file"):
        with written_atomically(tmp_path / "absent" / "result"):
            raise AssertionError


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ZeroDivisionError), written_atomically(tmp_path / "result"):
        raise ZeroDivisionError
    with pytest.raises(WriteError, match="inner: not written"), writing(tmp_path / "outer"):
        with writing(tmp_path / "inner"):
            raise OSError(28, "No space left on device")


def test_leftovers_of_killed_processes(tmp_path):
    program = f"""
import os, pathlib, dcae_fast.files
with dcae_fast.files.written_atomically(pathlib.Path({str(tmp_path)!r}) / "result") as temporary:
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    (tmp_path / ".tmpAb12Zz").touch()  # safetensors makes such names
    for name in ("result", ".hidden", "x.part"):
        (tmp_path / name).touch()
    left = leftovers(tmp_path)
    assert len(left) == 2 and all(path.name.startswith((".result.", ".tmp")) for path in left)
