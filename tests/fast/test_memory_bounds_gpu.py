"""Kernels read and write within their tensors, also where nothing lies behind a tensor in the GPU's memory.

The caching allocator puts tensors side by side, so that an access beyond one of them goes unnoticed until the memory
behind it is returned to the device. Here every tensor ends where mapped memory ends.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ALLOCATOR = """
#undef NDEBUG
#include <assert.h>
#include <cuda.h>
#include <stddef.h>
#define PAGE (2ull << 20)  // the granularity of mapped memory
#define ALIGNMENT 256  // libraries rely on that of cudaMalloc
static size_t rounded(size_t size, size_t to) { return (size + to - 1) / to * to; }
void* allocate(ptrdiff_t size, int device, void* stream) {
  if (size == 0) return NULL;
  const size_t mapped = rounded(size, PAGE);
  CUmemAllocationProp kind = {.type = CU_MEM_ALLOCATION_TYPE_PINNED};
  kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  kind.location.id = device;
  const CUmemAccessDesc access = {kind.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle memory;
  CUdeviceptr page;
  assert(!cuMemAddressReserve(&page, mapped + 2 * PAGE, 0, 0, 0));
  assert(!cuMemCreate(&memory, mapped, &kind, 0));
  assert(!cuMemMap(page + PAGE, mapped, 0, memory, 0));
  assert(!cuMemSetAccess(page + PAGE, mapped, &access, 1));
  assert(!cuMemRelease(memory));  // when it is no longer mapped
  return (void*)(page + PAGE + mapped - rounded(size, ALIGNMENT));
}
void release(void* pointer, ptrdiff_t size, int device, void* stream) {
  if (pointer == NULL || cuCtxSynchronize()) return;  // after an error of a kernel, nothing can be unmapped
  const size_t mapped = rounded(size, PAGE);
  const CUdeviceptr start = (CUdeviceptr)pointer / PAGE * PAGE;
  assert(!cuMemUnmap(start, mapped));
  assert(!cuMemAddressFree(start - PAGE, mapped + 2 * PAGE));
}
"""
STEPS = """
import ctypes, sys
import torch
ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
torch.cuda.memory.change_current_allocator(
    torch.cuda.memory.CUDAPluggableAllocator(sys.argv[1], "allocate", "release")
)
import dcae_fast
from dcae_fast.models.config import CoderConfig, DCAEConfig
from dcae_fast.training.autoencoder.network import PartlyTrained

def coder(norm, act):
    blocks = ("ResBlock",) * 3 + ("EViTGLU",) * 2
    norms, acts = (norm,) * 3 + ("rms",) * 2, (act,) * 3 + ("silu",) * 2
    return CoderConfig((32, 64, 64, 128, 128), (0, 1, 1, 1, 1), blocks, norms, acts)

config = DCAEConfig(32, coder("rms", "silu"), coder("batch", "relu"))
recipes = ("encoder", "decoder"), ("decoder",), ("encoder.project_out", "decoder.project_in")
for patched in (False, True):
    for recipe in recipes:
        print("patched" if patched else "eager", recipe, file=sys.stderr)
        torch.manual_seed(0)
        model = PartlyTrained(config).cuda().to(memory_format=torch.channels_last)
        model.choose(recipe)
        if patched:
            dcae_fast.patch(model, cuda_graphs=False)
        for shape in ((3, 3, 128, 192), (1, 3, 48, 80)):
            x = torch.randn(shape, device="cuda")
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = (model(x) - x).abs().mean()
            loss.backward()
            assert loss.isfinite()
"""


@pytest.mark.gpu
def test_training_steps_within_their_tensors(tmp_path):
    """Models like the ImageNet ones, with batch norm, ReLU and shuffled pixels. The choice of convolutions runs
    every candidate of cuDNN.
    """
    triton = pytest.importorskip("triton")
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    (tmp_path / "allocator.c").write_text(ALLOCATOR)
    command = [compiler, "-shared", "-fPIC", f"-I{header}", "allocator.c", "-o", "allocator.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = os.environ | {"DCAE_FAST_CACHE": str(tmp_path), "CUDA_LAUNCH_BLOCKING": "1"}
    command = [sys.executable, "-c", STEPS, tmp_path / "allocator.so"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
