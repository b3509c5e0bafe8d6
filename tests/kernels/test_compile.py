"""Kernels compile without a GPU: all for Hopper, without spills; the largest for GPUs with less shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent
KERNELS = Path(__file__).parents[2] / "kernels" / "src"


def printed_by(script, folder):
    """The words of each line that a script prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    result = subprocess.run([sys.executable, FOLDER / script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()]


def test_all_kernels_compile_for_sm90_without_spills(tmp_path):
    compiled = printed_by("compile_sm90.py", tmp_path)
    written = {
        line.split("(")[0].removeprefix("def ")
        for file in KERNELS.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert {name for name, _, _ in compiled} == written
    assert [row for row in compiled if int(row[2]) > 0] == [], "kernel, registers, bytes of stack"


def test_the_largest_tiles_fit_into_the_shared_memory_of_other_gpus(tmp_path):
    """Turing has no products of half precision; Ada has the least shared memory of the other GPUs."""
    needed = printed_by("compile_small_gpus.py", tmp_path)
    limits = {"75": 64 * 1024, "89": 99 * 1024}
    assert {(gpu, name) for gpu, name, _ in needed} == {
        (gpu, f"_{name}_kernel")
        for gpu in limits
        for name in (
            "conv2d",
            "multiscale_qkv_grouped_backward",
            "relu_linear_attention_query_backward",
            "rms_norm_conv2d_taps",
        )
    }
    assert [row for row in needed if int(row[2]) > limits[row[0]]] == [], "GPU, kernel, bytes of shared memory"
