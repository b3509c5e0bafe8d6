"""Rounds to int8 with one scale for each channel."""

import torch
import triton
import triton.language as tl

from .common import cdiv, like_channels_last, row_tile, rows_of
from .launch import Kernel

MOST_CHANNELS = 1024  # of a tile


@triton.jit
def to_int8(x, factor):
    """x · factor, rounded half to even, between -127 and 127. x: fp32.

    The sum with 1.5 · 2²³ has the rounded number in its lowest bits. This avoids slow instructions.
    """
    x = tl.minimum(tl.maximum(x * factor, -127.0), 127.0)
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@Kernel
def _quantize_kernel(
    x_ptr, factor_ptr, out_ptr, rows, channels, blocks_c, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    row = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    offset = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    factor = tl.load(factor_ptr + c, c < channels, 0.0)
    tl.store(out_ptr + offset, to_int8(x, factor[None, :]), mask)


def launch_quantize(x, factor):
    out, channels = like_channels_last(x, dtype=torch.int8), x.shape[1]
    if x.numel():
        block_rows, block_c = row_tile(channels, MOST_CHANNELS)
        blocks_c = cdiv(channels, block_c)
        _quantize_kernel[(cdiv(rows_of(x), block_rows) * blocks_c,)](
            x, factor, out, rows_of(x), channels, blocks_c, BLOCK_ROWS=block_rows, BLOCK_C=block_c
        )
    return out
