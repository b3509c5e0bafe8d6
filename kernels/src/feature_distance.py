"""The distance of LPIPS between two feature maps. A program computes whole rows: all channels of a position."""

import torch
import triton
import triton.language as tl

from .common import cdiv, like_channels_last, persistent_splits, row_tile, rows_of
from .launch import Kernel


@triton.jit
def _normalised(x_ptr, offset, mask, eps):
    """x with length 1 in each row, and the factors of the rows."""
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) + eps)
    return x * rstd[:, None], rstd


@triton.jit
def _block(block, rows, channels, c, BLOCK_ROWS: tl.constexpr):
    """Offsets and mask of a block of rows."""
    row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return row[:, None] * channels + c[None, :], (row < rows)[:, None] & (c < channels)[None, :]


@Kernel
def _feature_distance_kernel(
    a_ptr, b_ptr, head_ptr, partial_ptr, rows, channels, eps, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Writes the sum of this program's rows to partial [programs]."""
    c = tl.arange(0, BLOCK_C)
    head = tl.load(head_ptr + c, c < channels, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        offset, mask = _block(block, rows, channels, c, BLOCK_ROWS)
        a, _ = _normalised(a_ptr, offset, mask, eps)
        b, _ = _normalised(b_ptr, offset, mask, eps)
        total += head[None, :] * (a - b) * (a - b)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@Kernel
def _feature_distance_backward_kernel(
    ddistance_ptr, a_ptr, b_ptr, head_ptr, da_ptr, rows, channels, factor, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK_C)
    head = tl.load(head_ptr + c, c < channels, 0.0).to(tl.float32) * tl.load(ddistance_ptr).to(tl.float32) * factor
    offset, mask = _block(tl.program_id(0), rows, channels, c, BLOCK_ROWS)
    a, rstd = _normalised(a_ptr, offset, mask, eps)
    b, _ = _normalised(b_ptr, offset, mask, eps)
    du = head[None, :] * (a - b)
    da = (du - a * tl.sum(du * a, 1)[:, None]) * rstd[:, None]
    tl.store(da_ptr + offset, da.to(da_ptr.dtype.element_ty), mask)


def launch_feature_distance(a, b, head, eps):
    rows, channels = rows_of(a), a.shape[1]
    block_rows, block_c = row_tile(channels, channels, 2048)
    programs = persistent_splits(a, cdiv(rows, block_rows))
    partial = torch.empty(programs, dtype=torch.float32, device=a.device)
    _feature_distance_kernel[(programs,)](
        a, b, head, partial, rows, channels, eps,
        BLOCK_ROWS=block_rows, BLOCK_C=block_c, num_warps=max(4, block_c // 1024),
    )  # fmt: skip
    return partial.sum() / rows


def launch_feature_distance_backward(ddistance, a, b, head, eps):
    da, rows, channels = like_channels_last(a), rows_of(a), a.shape[1]
    block_rows, block_c = row_tile(channels, channels, 2048)
    _feature_distance_backward_kernel[(cdiv(rows, block_rows),)](
        ddistance, a, b, head, da, rows, channels, 2 / rows, eps,
        BLOCK_ROWS=block_rows, BLOCK_C=block_c, num_warps=max(4, block_c // 1024),
    )  # fmt: skip
    return da
