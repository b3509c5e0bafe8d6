"""Encoding and decoding in bounded memory on a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import OUTPUT, build, image
from test_bands import banded_steps, coders

import dcae_fast
from dcae_fast.fast import plan
from dcae_fast.models import DCAE

PLUGGABLE_ALLOCATOR = """
#include <dlfcn.h>
#include <stddef.h>
void* my_alloc(ptrdiff_t size, int device, void* stream) {
  void* pointer = 0;
  ((int (*)(void**, size_t))dlsym(dlopen(CUDART, RTLD_NOW), "cudaMalloc"))(&pointer, size);
  return pointer;
}
void my_free(void* pointer, ptrdiff_t size, int device, void* stream) {
  ((int (*)(void*))dlsym(dlopen(CUDART, RTLD_NOW), "cudaFree"))(pointer);
}
"""
WITH_PLUGGABLE_ALLOCATOR = """
import sys
import torch
allocator = torch.cuda.memory.CUDAPluggableAllocator(sys.argv[1], "my_alloc", "my_free")
torch.cuda.memory.change_current_allocator(allocator)
import dcae_fast
from small_models import build
model = build("adaptive").to("cuda", torch.bfloat16)
x = torch.rand(1, 3, 1024, 768, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    expected = model.encoder(x)
    for graphs in (False, True):
        dcae_fast.patch(model, cuda_graphs=graphs)
        for _ in range(3):
            assert (model.encoder(x) - expected).norm() <= 2e-2 * expected.norm()
"""


@pytest.mark.gpu
def test_another_allocator(tmp_path):
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    cudart = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line)
    (tmp_path / "allocator.c").write_text(PLUGGABLE_ALLOCATOR)
    command = [compiler, "-shared", "-fPIC", f'-DCUDART="{cudart}"', "allocator.c", "-o", "allocator.so", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    command = [sys.executable, "-c", WITH_PLUGGABLE_ALLOCATOR, tmp_path / "allocator.so"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
@torch.no_grad()
def test_what_is_free_decides(name, monkeypatch, compare):
    model, asked = build(name), []
    monkeypatch.setattr("dcae_fast.fast.call.SMALL", 0)
    dcae_fast.patch(model, cuda_graphs=False)
    for coder, x in coders(model, 1, 64, 32):
        assert coder.plan(x) is None
        expected = coder(x)
        with monkeypatch.context() as patch:
            patch.setattr("dcae_fast.fast.plan.free_memory", lambda device: asked.append(device) or 1)
            assert banded_steps(coder, x)
            compare("whole", coder(x), expected, OUTPUT)
    assert asked and all(device == x.device for device in asked)


@pytest.mark.gpu
def test_free_memory():
    torch.cuda.empty_cache()
    before = plan.free_memory(torch.device("cuda"))
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    held = plan.free_memory(torch.device("cuda"))
    del block
    after = plan.free_memory(torch.device("cuda"))
    assert before - held >= 2**27 and after - held >= 2**27  # other processes may use the GPU


@pytest.mark.gpu
@torch.no_grad()
def test_bounds_hold_on_a_gpu():
    """f32c32 with random weights on 2048×2048 pixels. The allocator measures the memory.

    Bands have at most twice the error of the whole image.
    """
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DCAE.from_name("dc-ae-f32c32-in-1.0").eval()
    x, z, bound = image(1, 3, 2048, 2048), image(1, 32, 64, 64), 2**31
    exact = [model.encoder(x), model.decoder(z)]
    model.to(torch.bfloat16, memory_format=torch.channels_last)
    for coder, value, want in zip((model.encoder, model.decoder), (x.bfloat16(), z.bfloat16()), exact, strict=True):
        dcae_fast.patch(coder, cuda_graphs=False)
        whole = coder(value)
        dcae_fast.patch(coder, cuda_graphs=False, max_memory=bound)
        assert banded_steps(coder, value)
        coder(value)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = coder(value)
        assert torch.cuda.max_memory_allocated() - before <= bound
        assert (got - want).norm() <= 2 * (whole - want).norm()
