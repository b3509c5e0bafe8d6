"""The CUDA sources compile for Hopper, and no kernel spills registers. Needs nvcc, not a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "csrc").glob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings"]
    command = ["nvcc", *target, "-c", source, "-o", tmp_path / "object.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0", "0")}, report
