"""Compile the kernels with the largest tiles for Turing and Ada; print the GPU, name, and bytes of shared memory.

The launchers choose the tiles for such a GPU. Compilation stops at LLVM IR: the shared memory is known by then, and
generating machine code takes the longest.
"""

from unittest import mock

import torch
import triton
from compile_sm90 import source
from dcae_fast.kernels import common
from dcae_fast.kernels.conv2d import launch_conv2d
from dcae_fast.kernels.multiscale_qkv import launch_multiscale_qkv_backward
from dcae_fast.kernels.relu_linear_attention import launch_relu_linear_attention_backward
from dcae_fast.kernels.rms_norm_conv2d import launch_rms_norm_conv2d
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

GPUS = {75: common.TURING, 89: common.ADA}  # by compute capability
LARGEST = (
    "_conv2d_kernel",
    "_multiscale_qkv_grouped_backward_kernel",
    "_relu_linear_attention_query_backward_kernel",
    "_rms_norm_conv2d_taps_kernel",
)
make_llir = CUDABackend.make_llir


class Enough(Exception):
    pass


def stop_after_llir(self, src, metadata, options, capability):
    make_llir(self, src, metadata, options, capability)
    raise Enough(metadata["shared"])


def compile_instead(capability):
    def run(kernel, *args, grid, warmup, **named):
        if kernel.__name__ not in LARGEST:
            return
        code, options = source(kernel, args, named)
        try:
            triton.compile(code, target=GPUTarget("cuda", capability, 32), options=options)
        except Enough as enough:
            print(capability, kernel.__name__, *enough.args, flush=True)

    return run


def launch(capability):
    dtype = torch.bfloat16 if capability == 75 else torch.float32
    x, weight = torch.empty(1, 4, 16, 16, dtype=dtype), torch.empty(128, 4, 7, 7, dtype=dtype)
    launch_conv2d(x, weight, None, "none", 2, (3, 3, 3, 3))
    qkv, dout = torch.empty(1, 192, 8, 8, dtype=torch.float16), torch.empty(1, 64, 8, 8, dtype=torch.float16)
    launch_relu_linear_attention_backward(dout, [qkv], 64, 1e-15)
    x = torch.empty(1, 64, 8, 8, dtype=dtype)
    launch_multiscale_qkv_backward(x, x, torch.empty(64, 1, 5, 5), torch.empty(64, 64, 1, 1), True)
    x, weight = torch.empty(1, 128, 8, 8, dtype=torch.float16), torch.empty(3, 128, 3, 3, dtype=torch.float16)
    launch_rms_norm_conv2d(x, torch.empty(128), torch.empty(128), 1e-5, "silu", weight, torch.empty(3))


for capability, chip in GPUS.items():
    with (
        mock.patch.object(CUDABackend, "make_llir", stop_after_llir),
        mock.patch.object(JITFunction, "run", compile_instead(capability)),
        mock.patch.object(common, "chips", lambda x, chip=chip: (chip,)),
    ):
        launch(capability)
