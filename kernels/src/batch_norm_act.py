"""Batch norm with the statistics of the batch, activation and residual.

Two passes over the tensor: one for the statistics, one for the result, which is the kernel of bias_act. The gradient
takes two passes as well: one for the sums over positions, one for the input. Each split of the positions writes its own
sums, which are added afterwards in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .bias_act import MOST_CHANNELS, launch_bias_act, norm_terms
from .common import activate_backward, cdiv, like_channels_last, persistent_splits, row_tile, rows_of
from .launch import Kernel
from .sum_of_splits import WARPS, sum_of_splits, tile

LOOPS = {"elements": 2048, "per_processor": 4, "stages": 3}  # of the programs that sum over the gradient's positions


@triton.jit
def _rows_of_split(split, splits, rows, BLOCK_ROWS: tl.constexpr):
    """The number of rows that a split reads: those of every `splits`-th block. The last block may be incomplete."""
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    missing = blocks * BLOCK_ROWS - rows
    return (blocks - split + splits - 1) // splits * BLOCK_ROWS - tl.where((blocks - 1) % splits == split, missing, 0)


@Kernel
def _batch_norm_act_split_kernel(
    x_ptr, partial_ptr, rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr
):
    """Writes mean and Σ (x - mean)² of this split's rows to partial [splits, 2, channels]. Sums are of x - x₀, with the
    mean x₀ of the split's first block, so that a large mean does not cancel digits.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    split, splits = tl.program_id(0) // blocks_c, tl.num_programs(0) // blocks_c
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    row = tl.cast(split, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & c_mask[None, :]
    x = tl.load(x_ptr + row[:, None] * channels + c[None, :], mask, 0.0).to(tl.float32)
    first = tl.sum(x, 0) / tl.minimum(rows - split * BLOCK_ROWS, BLOCK_ROWS).to(tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in tl.range(split, tl.cdiv(rows, BLOCK_ROWS), splits, num_stages=STAGES):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & c_mask[None, :]
        x = tl.load(x_ptr + row[:, None] * channels + c[None, :], mask, 0.0).to(tl.float32)
        difference = tl.where(mask, x - first[None, :], 0.0)
        total += difference
        squares += difference * difference
    count = _rows_of_split(split, splits, rows, BLOCK_ROWS).to(tl.float32)
    mean = tl.sum(total, 0) / count
    partial = partial_ptr + split * 2 * channels + c
    tl.store(partial, first + mean, c_mask)
    tl.store(partial + channels, tl.sum(squares, 0) - mean * mean * count, c_mask)


@Kernel
def _batch_norm_act_statistics_kernel(
    partial_ptr, mean_ptr, variance_ptr, rows, channels, splits,
    BLOCK_ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and variance of all rows from those of the splits."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((SPLITS, BLOCK_C), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & (c < channels)[None, :]
        mean = tl.load(partial_ptr + split[:, None] * 2 * channels + c[None, :], mask, 0.0)
        total += mean * _rows_of_split(split, splits, rows, BLOCK_ROWS).to(tl.float32)[:, None]
    of_all = tl.sum(total, 0) / rows
    total = tl.zeros((SPLITS, BLOCK_C), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & (c < channels)[None, :]
        partial = partial_ptr + split[:, None] * 2 * channels + c[None, :]
        difference = tl.where(mask, tl.load(partial, mask, 0.0) - of_all[None, :], 0.0)
        count = _rows_of_split(split, splits, rows, BLOCK_ROWS).to(tl.float32)[:, None]
        total += tl.load(partial + channels, mask, 0.0) + difference * difference * count
    tl.store(mean_ptr + c, of_all, c < channels)
    tl.store(variance_ptr + c, tl.sum(total, 0) / rows, c < channels)


@triton.jit
def _block(
    dy_ptr, x_ptr, block, c, c_mask, mean, factor, bias, rstd, rows, channels,
    ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Of a block of rows: offsets, mask, normalised x, and the gradient before the activation."""
    row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & c_mask[None, :]
    offset = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32) - mean[None, :]
    dy = tl.load(dy_ptr + offset, mask, 0.0).to(tl.float32)
    dz = activate_backward(x * factor[None, :] + bias[None, :], dy, ACT, x_ptr.dtype.element_ty == tl.float32)
    return offset, mask, x * rstd[None, :], dz


@Kernel
def _batch_norm_act_sums_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, scale_ptr, mean_ptr, variance_ptr, partial_ptr, rows, channels, eps,
    ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes this split's sums of dbias and dscale to partial [splits, 2, channels]."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    split, splits = tl.program_id(0) // blocks_c, tl.num_programs(0) // blocks_c
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    mean, factor, bias, rstd = norm_terms(bias_ptr, scale_ptr, mean_ptr, variance_ptr, eps, c, c_mask, True)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    dscale = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in tl.range(split, tl.cdiv(rows, BLOCK_ROWS), splits, num_stages=STAGES):
        _, _, normalised, dz = _block(
            dy_ptr, x_ptr, block, c, c_mask, mean, factor, bias, rstd, rows, channels, ACT, BLOCK_ROWS
        )
        dbias += dz
        dscale += dz * normalised
    partial = partial_ptr + split * 2 * channels + c
    tl.store(partial, tl.sum(dbias, 0), c_mask)
    tl.store(partial + channels, tl.sum(dscale, 0), c_mask)


@Kernel
def _batch_norm_act_input_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, scale_ptr, mean_ptr, variance_ptr, dbias_ptr, dscale_ptr, dx_ptr, rows, channels, eps,
    ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks_c = tl.cdiv(channels, BLOCK_C)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    mean, factor, bias, rstd = norm_terms(bias_ptr, scale_ptr, mean_ptr, variance_ptr, eps, c, c_mask, True)
    dbias, dscale = tl.load(dbias_ptr + c, c_mask, 0.0) / rows, tl.load(dscale_ptr + c, c_mask, 0.0) / rows
    offset, mask, normalised, dz = _block(
        dy_ptr, x_ptr, tl.program_id(0) // blocks_c, c, c_mask, mean, factor, bias, rstd, rows, channels, ACT,
        BLOCK_ROWS,
    )  # fmt: skip
    dx = (dz - dbias[None, :] - normalised * dscale[None, :]) * factor[None, :]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)


def _launch_statistics(x):
    rows, channels = rows_of(x), x.shape[1]
    block_rows, block_c = row_tile(channels, MOST_CHANNELS, 2 * LOOPS["elements"])
    blocks_c = cdiv(channels, block_c)
    splits = persistent_splits(x, cdiv(rows, block_rows), blocks_c, LOOPS["per_processor"])
    partial = torch.empty(splits, 2, channels, dtype=torch.float32, device=x.device)
    mean, variance = partial.new_empty(channels), partial.new_empty(channels)
    _batch_norm_act_split_kernel[(splits * blocks_c,)](
        x, partial, rows, channels, BLOCK_ROWS=block_rows, BLOCK_C=block_c, STAGES=LOOPS["stages"]
    )
    sides = tile(splits)
    _batch_norm_act_statistics_kernel[(cdiv(channels, sides["BLOCK_C"]),)](
        partial, mean, variance, rows, channels, splits, BLOCK_ROWS=block_rows, **sides, num_warps=WARPS
    )
    return mean, variance


def launch_batch_norm_act(x, scale, bias, eps, act, residual, dtype):
    """The result, and mean and variance of the batch in fp32. x must not be empty."""
    mean, variance = _launch_statistics(x)
    return launch_bias_act(x, bias, act, scale, mean, variance, eps, residual, dtype), mean, variance


def launch_batch_norm_act_backward(dy, x, scale, bias, mean, variance, eps, act):
    """The gradients by x, scale and bias. x must not be empty."""
    dx, rows, channels = like_channels_last(x), rows_of(x), x.shape[1]
    block_rows, block_c = row_tile(channels, MOST_CHANNELS, LOOPS["elements"])
    blocks, blocks_c = cdiv(rows, block_rows), cdiv(channels, block_c)
    splits = persistent_splits(x, blocks, blocks_c, LOOPS["per_processor"])
    partial = torch.empty(splits, 2, channels, dtype=torch.float32, device=x.device)
    _batch_norm_act_sums_backward_kernel[(splits * blocks_c,)](
        dy, x, bias, scale, mean, variance, partial, rows, channels, eps,
        ACT=act, BLOCK_ROWS=block_rows, BLOCK_C=block_c, STAGES=LOOPS["stages"],
    )  # fmt: skip
    dbias, dscale = sum_of_splits(partial, torch.float32, torch.float32)
    _batch_norm_act_input_backward_kernel[(blocks * blocks_c,)](
        dy, x, bias, scale, mean, variance, dbias, dscale, dx, rows, channels, eps,
        ACT=act, BLOCK_ROWS=block_rows, BLOCK_C=block_c,
    )  # fmt: skip
    return dx, dscale.to(scale.dtype), dbias.to(bias.dtype)
