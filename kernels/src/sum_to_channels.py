"""Sums an image over all positions, for the gradient of a bias. Each split of the positions writes a sum in fp32."""

import torch
import triton.language as tl

from .common import cdiv, persistent_splits, row_tile, rows_of
from .launch import Kernel

MOST_CHANNELS = 1024  # of a program
FEW_ROWS = {"BLOCK_ROWS": 128, "BLOCK_C": 16}  # tile for the sum over the splits


@Kernel
def _sum_to_channels_kernel(x_ptr, sums_ptr, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """x [rows, channels] → sums [splits, channels]. The sums of each row of the tile stay apart until the end, so that
    threads exchange nothing in the loop.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    split, splits = tl.program_id(0) // blocks_c, tl.num_programs(0) // blocks_c
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in range(split, tl.cdiv(rows, BLOCK_ROWS), splits):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        total += tl.load(x_ptr + row[:, None] * channels + c[None, :], mask, 0.0).to(tl.float32)
    sums = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + tl.cast(split, tl.int64) * channels + c, sums, c < channels)


def launch_sum_to_channels(x, dtype):
    """[B, C, H, W] → [C]."""
    rows, channels = rows_of(x), x.shape[1]
    block_rows, block_c = row_tile(channels, MOST_CHANNELS)
    blocks_c = cdiv(channels, block_c)
    splits = persistent_splits(x, cdiv(rows, block_rows), blocks_c, per_processor=8)
    partial = torch.empty(splits, channels, dtype=torch.float32, device=x.device)
    sums = torch.empty(channels, dtype=dtype, device=x.device)
    if splits:
        _sum_to_channels_kernel[(splits * blocks_c,)](
            x, partial, rows, channels, BLOCK_ROWS=block_rows, BLOCK_C=block_c
        )
    if channels:
        _sum_to_channels_kernel[(cdiv(channels, FEW_ROWS["BLOCK_C"]),)](partial, sums, splits, channels, **FEW_ROWS)
    return sums
