"""Bias or batch norm in evaluation mode, activation and residual after a convolution, in one pass over the tensor."""

import torch
import triton
import triton.language as tl

from .common import activate, activate_backward, cdiv, like_channels_last, persistent_splits, row_tile, rows_of
from .launch import Kernel
from .sum_of_splits import sum_of_splits

MOST_CHANNELS = 1024  # of a program
BACKWARD = {"elements": 2048, "per_processor": 4, "stages": 3, "num_warps": 4}  # of the gradient's programs


@triton.jit
def norm_terms(bias_ptr, scale_ptr, mean_ptr, variance_ptr, eps, c, mask, HAS_NORM: tl.constexpr):
    """(mean, factor, bias) such that (x - mean) * factor + bias is the batch norm of x, or x + bias without a norm; and
    1 / standard deviation. The mean is subtracted first: where it is large, x * factor + shift would cancel digits.
    """
    bias = tl.load(bias_ptr + c, mask, 0.0).to(tl.float32)
    if HAS_NORM:
        rstd = tl.rsqrt(tl.load(variance_ptr + c, mask, 1.0).to(tl.float32) + eps)
        factor = tl.load(scale_ptr + c, mask, 0.0).to(tl.float32) * rstd
        return tl.load(mean_ptr + c, mask, 0.0).to(tl.float32), factor, bias, rstd
    else:
        one = tl.full(bias.shape, 1.0, tl.float32)
        return tl.zeros(bias.shape, tl.float32), one, bias, one


@Kernel
def _bias_act_forward_kernel(
    x_ptr, bias_ptr, scale_ptr, mean_ptr, variance_ptr, residual_ptr, out_ptr, rows, channels, eps,
    ACT: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks_c = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // blocks_c).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    offset = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offset, mask, 0.0).to(tl.float32)
    mean, factor, bias, _ = norm_terms(bias_ptr, scale_ptr, mean_ptr, variance_ptr, eps, c, c < channels, HAS_NORM)
    y = activate((x - mean[None, :]) * factor[None, :] + bias[None, :], ACT, x_ptr.dtype.element_ty == tl.float32)
    if HAS_RESIDUAL:
        y += residual
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask)


@Kernel
def _bias_act_backward_kernel(
    dy_ptr, x_ptr, bias_ptr, scale_ptr, mean_ptr, variance_ptr, dx_ptr, partial_ptr, rows, channels, eps,
    ACT: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes dx, and this program's partial sums of dbias and dscale to partial [splits, 2, channels]. The sums of each
    row of the tile stay apart until the end, so that threads exchange nothing in the loop.
    """
    blocks_c = tl.cdiv(channels, BLOCK_C)
    split, splits = tl.program_id(0) // blocks_c, tl.num_programs(0) // blocks_c
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    mean, factor, bias, rstd = norm_terms(bias_ptr, scale_ptr, mean_ptr, variance_ptr, eps, c, c_mask, HAS_NORM)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    dscale = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in tl.range(split, tl.cdiv(rows, BLOCK_ROWS), splits, num_stages=STAGES):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & c_mask[None, :]
        offset = row[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask, 0.0).to(tl.float32)
        z = (x - mean[None, :]) * factor[None, :] + bias[None, :]
        dz = activate_backward(z, dy, ACT, x_ptr.dtype.element_ty == tl.float32)
        tl.store(dx_ptr + offset, (dz * factor[None, :]).to(dx_ptr.dtype.element_ty), mask)
        dbias += dz
        if HAS_NORM:
            dscale += dz * ((x - mean[None, :]) * rstd[None, :])
    partial = partial_ptr + split * 2 * channels + c
    tl.store(partial, tl.sum(dbias, 0), c_mask)
    tl.store(partial + channels, tl.sum(dscale, 0), c_mask)


@Kernel
def _fold_batch_norm_kernel(
    weight_ptr, bias_ptr, scale_ptr, mean_ptr, variance_ptr, folded_ptr, shift_ptr, size, eps, BLOCK: tl.constexpr
):
    """A program computes BLOCK of the `size` elements of a filter."""
    blocks = tl.cdiv(size, BLOCK)
    k, block = tl.program_id(0) // blocks + tl.arange(0, 1), tl.program_id(0) % blocks
    mean, factor, bias, _ = norm_terms(bias_ptr, scale_ptr, mean_ptr, variance_ptr, eps, k, k >= 0, True)
    i = block * BLOCK + tl.arange(0, BLOCK)
    offset = k.to(tl.int64) * size + i
    weight = tl.load(weight_ptr + offset, i < size, 0.0).to(tl.float32)
    tl.store(folded_ptr + offset, (weight * factor).to(folded_ptr.dtype.element_ty), i < size)
    if block == 0:
        tl.store(shift_ptr + k, (bias - mean * factor).to(shift_ptr.dtype.element_ty))


def launch_fold_batch_norm(weight, bias, scale, mean, variance, eps, dtype):
    """Weight and bias, in this dtype, of the convolution that equals conv(x, weight) followed by the batch norm."""
    folded, shift = torch.empty_like(weight, dtype=dtype), torch.empty_like(bias, dtype=dtype)
    filters, size = weight.shape[0], weight.numel() // weight.shape[0]
    _fold_batch_norm_kernel[(filters * cdiv(size, 1024),)](
        weight, bias, scale, mean, variance, folded, shift, size, eps, BLOCK=1024
    )
    return folded, shift


def launch_bias_act(x, bias, act, scale, mean, variance, eps, residual, dtype):
    out, channels = like_channels_last(x, dtype=dtype), x.shape[1]
    if out.numel():
        block_rows, block_c = row_tile(channels, MOST_CHANNELS)
        _bias_act_forward_kernel[(cdiv(rows_of(x), block_rows) * cdiv(channels, block_c),)](
            x, bias, scale, mean, variance, residual, out, rows_of(x), channels, eps,
            ACT=act, HAS_NORM=scale is not None, HAS_RESIDUAL=residual is not None,
            BLOCK_ROWS=block_rows, BLOCK_C=block_c,
        )  # fmt: skip
    return out


def launch_bias_act_backward(dy, x, bias, act, scale, mean, variance, eps):
    dx, channels = like_channels_last(x), x.shape[1]
    block_rows, block_c = row_tile(channels, MOST_CHANNELS, BACKWARD["elements"])
    blocks_c, blocks = cdiv(channels, block_c), cdiv(rows_of(x), block_rows)
    splits = persistent_splits(x, blocks, blocks_c, BACKWARD["per_processor"])
    partial = torch.empty(splits, 2, channels, dtype=torch.float32, device=x.device)
    if splits:
        _bias_act_backward_kernel[(splits * blocks_c,)](
            dy, x, bias, scale, mean, variance, dx, partial, rows_of(x), channels, eps,
            ACT=act, HAS_NORM=scale is not None, BLOCK_ROWS=block_rows, BLOCK_C=block_c, STAGES=BACKWARD["stages"],
            num_warps=BACKWARD["num_warps"],
        )  # fmt: skip
    return dx, *sum_of_splits(partial, bias.dtype, bias.dtype if scale is None else scale.dtype)
