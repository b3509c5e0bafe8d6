"""Every kernel compiles for Hopper on a machine without a GPU, and none spills registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_sm90.py")
KERNELS = Path(__file__).parents[2] / "kernels" / "src"


def test_all_kernels_compile_for_sm90_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    compiled = [line.split() for line in result.stdout.splitlines()]
    written = {
        line.split("(")[0].removeprefix("def ")
        for file in KERNELS.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert {name for name, _, _ in compiled} == written
    assert [row for row in compiled if int(row[2]) > 0] == [], "kernel, registers, bytes of stack"
