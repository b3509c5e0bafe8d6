"""Rounds to int8 with one scale."""

import torch
import triton
import triton.language as tl

from .common import cdiv
from .launch import Kernel

BLOCK = 4096


@triton.jit
def to_int8(x, inverse_scale):
    """x · inverse_scale, rounded half to even, between -127 and 127. x: fp32.

    The sum with 1.5 · 2²³ has the rounded number in its lowest bits. This avoids slow instructions.
    """
    x = tl.minimum(tl.maximum(x * inverse_scale, -127.0), 127.0)
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def converted(x, TYPE: tl.constexpr, inverse_scale):
    """x in a type; as int8 in units of 1 / inverse_scale. x: fp32."""
    if TYPE == tl.int8:
        return to_int8(x, inverse_scale)
    else:
        return x.to(TYPE)


@Kernel
def _quantize_kernel(x_ptr, out_ptr, elements, inverse_scale, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < elements, 0.0).to(tl.float32)
    tl.store(out_ptr + i, to_int8(x, inverse_scale), i < elements)


def inverse(scale):
    """1 / scale, the argument of kernels that write int8; any number without a scale."""
    return 1.0 if scale is None else 1 / scale


def launch_quantize(x, scale):
    out = torch.empty_like(x, dtype=torch.int8)
    if x.numel():
        _quantize_kernel[(cdiv(x.numel(), BLOCK),)](x, out, x.numel(), 1 / scale, BLOCK=BLOCK)
    return out
