"""The CUDA sources compile for Hopper without register spills, also with the compiler from PyPI. Needs no GPU."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "kernels").glob("*.cu"))
PACKAGED = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")  # installed by the extra "cuda"
NVCC = shutil.which("nvcc") or (PACKAGED if PACKAGED.is_file() else None)


@pytest.mark.parametrize("folder", ["kernels", "plans"])
def test_only_bindings_see_torch(folder):
    files = [path for path in (ROOT / "csrc" / folder).iterdir() if path.is_file()]
    assert files
    included = {
        path.name: re.findall(r"#include [<\"](?:torch|ATen|c10|pybind11|bindings)/.*", path.read_text())
        for path in files
    }
    assert not any(included.values()), included


@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH; pip install '.[cuda]' brings one")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings"]
    command = [NVCC, *target, "-c", source, "-o", tmp_path / "object.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0", "0")}, report


@pytest.mark.skipif(not PACKAGED.is_file(), reason="PyPI's compiler is absent; pip install '.[cuda]' brings it")
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake or ninja on the PATH")
def test_cmake_configures_and_compiles_with_the_compiler_of_pypi(tmp_path):
    """As on a machine with a driver and no CUDA toolkit. Only linking would need torch."""
    options = [f"-DCMAKE_CUDA_COMPILER={PACKAGED}", f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH={tmp_path}"]
    without_toolkit = os.environ | {"PATH": without_nvcc(os.environ["PATH"]), "CUDA_HOME": "", "CUDA_PATH": ""}
    for command in (
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", *options],
        ["ninja", "-C", tmp_path / "build", "CMakeFiles/_C.dir/csrc/kernels/gelu_backward.cu.o"],
    ):
        result = subprocess.run(command, env=without_toolkit, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    library, rules = PACKAGED.parents[1] / "lib", (tmp_path / "build" / "build.ninja").read_text()
    assert f"{library}/libcudart_static.a" in rules and f"LINK_FLAGS = -L{library}\n" in rules


def without_nvcc(path: str) -> str:
    return os.pathsep.join(folder for folder in path.split(os.pathsep) if not Path(folder, "nvcc").exists())
