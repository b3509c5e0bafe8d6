"""setup.py's decision about the CUDA extension, with simulated torch, compilers and GPUs."""

import importlib.util
import os
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

SETUP, WHICH = Path(__file__).parents[1] / "setup.py", shutil.which


def program(path: Path, output: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)


@pytest.fixture
def decide(tmp_path, monkeypatch):
    """decide(cuda, nvcc, ...) runs setup.py with this CUDA of torch and this nvcc in CUDA_HOME; returns its globals."""

    def only_there(path):
        """Hides the compilers of this machine."""
        return path if path and path.startswith(str(tmp_path)) else None

    def run(cuda, nvcc=None, packaged=None, gpu=None, asked="", command="egg_info"):
        program(tmp_path / "site" / "torch" / "bin" / "nothing", "")
        (tmp_path / "site" / "torch" / "version.py").write_text(f"cuda = {cuda!r}\n")
        torch = SimpleNamespace(origin=str(tmp_path / "site" / "torch" / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: torch)
        if nvcc:
            program(tmp_path / "home" / "bin" / "nvcc", f"Cuda compilation tools, release {nvcc}, V{nvcc}.1")
        if packaged:
            folder = tmp_path / "site" / "nvidia" / f"cu{packaged.split('.')[0]}"
            program(folder / "bin" / "nvcc", f"Cuda compilation tools, release {packaged}, V{packaged}.1")
        if gpu:
            program(tmp_path / "bin" / "nvidia-smi", gpu)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: only_there(WHICH(*args, **kwargs)))
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("DCAE_FAST_BUILD_CUDA", asked)
        monkeypatch.setattr("sys.argv", ["setup.py", command])
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        return SimpleNamespace(**runpy.run_path(str(SETUP)), given=given)

    return run


@pytest.mark.parametrize("cuda, nvcc", [("12.6", "12.5"), ("12.6", "12.9"), ("13.0", "13.0"), ("13.0", "13.2")])
def test_builds_with_an_nvcc_that_fits_torch(decide, cuda, nvcc):
    found = decide(cuda, nvcc)
    assert found.REASON is None and found.NVCC.endswith("home/bin/nvcc")
    assert [extension.name for extension in found.given["ext_modules"]] == ["dcae_fast._C"]


@pytest.mark.parametrize("cuda, nvcc", [("12.6", "13.0"), ("12.6", "12.4"), ("12.6", "11.8"), ("13.0", "12.9")])
def test_the_reason_names_an_nvcc_that_does_not_fit(decide, cuda, nvcc):
    found = decide(cuda, nvcc)
    assert found.NVCC is None and found.given["ext_modules"] == []
    assert f"home/bin/nvcc of CUDA {nvcc}" in found.REASON and f"CUDA {cuda.split('.')[0]}" in found.REASON


def test_an_nvcc_that_does_not_run_is_ignored(decide, tmp_path):
    program(tmp_path / "home" / "bin" / "nvcc", "")
    (tmp_path / "home" / "bin" / "nvcc").write_bytes(b"\x7fELF of another machine")
    assert "contain none" in decide("13.0").REASON


def test_installs_the_compiler_for_a_hopper_gpu_without_one(decide):
    wanted = ["cuda-toolkit[cccl,crt,cudart,nvcc]==13.2.*"]
    assert decide("13.2", gpu="9.0").given["setup_requires"] == wanted
    assert decide("13.2", nvcc="12.9", gpu="8.0\n9.0").given["setup_requires"] == wanted
    assert decide("13.2", asked="1").given["setup_requires"] == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"cuda": "13.0"},
        {"cuda": "13.0", "gpu": "8.9"},
        {"cuda": "12.6", "gpu": "9.0"},  # PyPI's package of nvcc 12 contains no compiler
        {"cuda": None, "gpu": "9.0"},
        {"cuda": "13.0", "gpu": "9.0", "nvcc": "13.0"},
        {"cuda": "13.0", "gpu": "9.0", "asked": "0"},
        {"cuda": "13.0", "gpu": "9.0", "command": "editable_wheel"},
    ],
)
def test_installs_no_compiler_otherwise(decide, options):
    assert decide(**options).given["setup_requires"] == []


def test_uses_the_compiler_that_pip_installed(decide):
    found = decide("13.0", nvcc="12.6", packaged="13.0", command="editable_wheel")
    assert found.NVCC.endswith("site/nvidia/cu13/bin/nvcc") and found.REASON is None


def test_a_requested_extension_that_cannot_be_built_is_an_error(decide):
    with pytest.raises(SystemExit, match="needs nvcc 12.5 or newer of CUDA 12"):
        decide("12.6", nvcc="11.8", asked="1")


def test_the_reason_for_skipping(decide):
    assert decide("13.0", "13.0", asked="0").REASON == "DCAE_FAST_BUILD_CUDA=0"
    assert decide(None, "13.0").REASON == "the installed torch is not a CUDA build"
