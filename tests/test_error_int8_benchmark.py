"""benchmarks.error_int8 on a small picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it computes with the kernels")
def test_the_error_of_a_photograph(tmp_path):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{name}.png")
    command = [sys.executable, "-m", "benchmarks.error_int8", tmp_path / "one.png", "--calibrate", tmp_path / "two.png"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    text = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "Measured on 1 picture" in text
    from_exact = float(text.partition("one: ")[2].split()[0])
    assert 30 < from_exact < 70
