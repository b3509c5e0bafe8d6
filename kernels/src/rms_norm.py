"""Channel RMS norm with activation and residual. A program computes whole rows: all channels of a position."""

import torch
import triton.language as tl

from .common import activate, activate_backward, cdiv, like_channels_last, persistent_splits, row_tile, rows_of
from .launch import Kernel
from .quantize import to_int8
from .sum_of_splits import sum_of_splits

BACKWARD = {"elements": 2048, "per_processor": 4, "stages": 3, "num_warps": 4}  # of the gradient's programs


@Kernel
def _rms_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, quantized_ptr, factor_ptr, rows, channels, eps,
    ACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    offset = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + offset, mask, 0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, c < channels, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c < channels, 0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
    y = activate(x * rstd[:, None] * weight[None, :] + bias[None, :], ACT, x_ptr.dtype.element_ty == tl.float32)
    if HAS_RESIDUAL:
        y += residual
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask)
    if quantized_ptr is not None:
        factor = tl.load(factor_ptr + c, c < channels, 0.0)
        tl.store(quantized_ptr + offset, to_int8(y, factor[None, :]), mask)


@Kernel
def _rms_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, dx_ptr, partial_ptr, rows, channels, eps,
    ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes dx, and this program's partial sums of dweight and dbias to partial [programs, 2, channels]. The sums of
    each row of the tile stay apart until the end, so that threads exchange little in the loop.
    """
    c = tl.arange(0, BLOCK_C)
    c_mask = c < channels
    weight = tl.load(weight_ptr + c, c_mask, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, c_mask, 0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & c_mask[None, :]
        offset = row[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask, 0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
        x_hat = x * rstd[:, None]
        z = x_hat * weight[None, :] + bias[None, :]
        dz = activate_backward(z, dy, ACT, x_ptr.dtype.element_ty == tl.float32)
        dx_hat = dz * weight[None, :]
        mean = tl.sum(x_hat * dx_hat, 1) / channels
        dx = (dx_hat - x_hat * mean[:, None]) * rstd[:, None]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)
        dweight += dz * x_hat
        dbias += dz
    partial = partial_ptr + tl.program_id(0) * 2 * channels + c
    tl.store(partial, tl.sum(dweight, 0), c_mask)
    tl.store(partial + channels, tl.sum(dbias, 0), c_mask)


def _num_warps(block_c):
    return max(4, block_c // 1024)


def launch_rms_norm(x, weight, bias, eps, act, residual, dtype):
    return launch_rms_norm_int8(x, weight, bias, eps, act, residual, dtype, None)[0]


def launch_rms_norm_int8(x, weight, bias, eps, act, residual, dtype, out_factor):
    """The result, and the same as int8; None in its place if out_factor is None."""
    out = like_channels_last(x, dtype=dtype)
    quantized = None if out_factor is None else like_channels_last(x, dtype=torch.int8)
    if x.numel():
        block_rows, block_c = row_tile(x.shape[1], x.shape[1])
        _rms_norm_forward_kernel[(cdiv(rows_of(x), block_rows),)](
            x, weight, bias, residual, out, quantized, out_factor, rows_of(x), x.shape[1], eps,
            ACT=act, HAS_RESIDUAL=residual is not None, BLOCK_ROWS=block_rows, BLOCK_C=block_c,
            num_warps=_num_warps(block_c),
        )  # fmt: skip
    return out, quantized


def launch_rms_norm_backward(dy, x, weight, bias, eps, act):
    dx, channels = like_channels_last(x), x.shape[1]
    block_rows, block_c = row_tile(channels, channels, BACKWARD["elements"])
    programs = persistent_splits(x, cdiv(rows_of(x), block_rows), 1, BACKWARD["per_processor"])
    partial = torch.empty(programs, 2, channels, dtype=torch.float32, device=x.device)
    if programs:
        _rms_norm_backward_kernel[(programs,)](
            dy, x, weight, bias, dx, partial, rows_of(x), channels, eps,
            ACT=act, BLOCK_ROWS=block_rows, BLOCK_C=block_c, STAGES=BACKWARD["stages"],
            num_warps=max(BACKWARD["num_warps"], block_c // 1024),
        )  # fmt: skip
    return dx, *sum_of_splits(partial, weight.dtype, bias.dtype)
