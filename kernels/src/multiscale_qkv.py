"""Depthwise k×k convolution and grouped 1×1 convolution in one pass: [B, C, H, W] → [B, C, H, W], groups of D channels.

A program computes the D channels of a group on a tile of pixels. It adds up the taps in fp32 and multiplies by the
group's D × D matrix. The halo comes from the cache.
"""

import triton
import triton.language as tl

from .common import like_channels_last
from .launch import Kernel

ROWS, COLUMNS = 8, 16  # of a tile


@Kernel
def _multiscale_qkv_kernel(
    x_ptr, taps_ptr, grouped_ptr, out_ptr, height, width, channels, tiles_y, tiles_x,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs are numbered by (image, row, column, group), so that neighbours share cache lines."""
    groups = channels // D
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    p = tl.arange(0, ROWS * COLUMNS)
    row = tile // tiles_x % tiles_y * ROWS + p // COLUMNS
    column = tile % tiles_x * COLUMNS + p % COLUMNS
    d = tl.arange(0, D)
    c = group * D + d
    image = (tile // (tiles_x * tiles_y)).to(tl.int64) * height * width
    offset = (image + row * width + column)[:, None] * channels + c[None, :]
    total = tl.zeros((ROWS * COLUMNS, D), tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            y, x = row + i - K // 2, column + j - K // 2
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            shift = ((i - K // 2) * width + j - K // 2) * channels
            value = tl.load(x_ptr + offset + shift, inside[:, None], 0.0).to(tl.float32)
            total += value * tl.load(taps_ptr + (i * K + j) * channels + c).to(tl.float32)[None, :]
    # the depthwise result is rounded to x's type, as by a separate convolution; tf32 represents half precision exactly
    PRECISION: tl.constexpr = "tf32x3" if x_ptr.dtype.element_ty == tl.float32 else "tf32"
    total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
    matrix = tl.load(grouped_ptr + c[None, :] * D + d[:, None]).to(tl.float32)
    out = tl.dot(total, matrix, input_precision=PRECISION)
    mask = (row < height) & (column < width)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask[:, None])


def launch_multiscale_qkv(x, depthwise, grouped):
    batch, channels, height, width = x.shape
    tiles_y, tiles_x = triton.cdiv(height, ROWS), triton.cdiv(width, COLUMNS)
    out = like_channels_last(x)
    if out.numel():
        dim, taps = grouped.shape[1], depthwise.flatten(1).t().contiguous()
        _multiscale_qkv_kernel[(batch * tiles_y * tiles_x * (channels // dim),)](
            x, taps, grouped, out, height, width, channels, tiles_y, tiles_x,
            D=dim, K=depthwise.shape[2], ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out
