"""Layer norm of tokens with results in 8 bit, each token with its own scale; see layer_norm.py and quantize_rows.py.

For training also with the same results in another type.
"""

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, cdiv, next_power_of_2, promoted
from .launch import Kernel
from .quantize_rows import empty_rows, magnitude, parts_of, scale_and_inverse, to_8_bit

WIDTH_OF_A_WARP = 1536  # a warp computes a token of up to this width, so that its sums need no other warp


@triton.jit
def _load_sum(x_ptr, branch_ptr, gate_ptr, sum_ptr, place, of_image, mask, HAS_BRANCH: tl.constexpr):
    """x + gate · branch, which is also stored, or x."""
    x = tl.load(x_ptr + place, mask, 0.0).to(tl.float32)
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + of_image, mask, 0.0).to(tl.float32)
        total = x + gate * tl.load(branch_ptr + place, mask, 0.0).to(tl.float32)
        total = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, total, mask)
        x = total.to(tl.float32)
    return x


@triton.jit
def _modulated(x, scale_ptr, shift_ptr, of_image, mask, OF_IMAGE: tl.constexpr):
    """x · scale + shift; zero where masked. of_image: where the vectors of each row lie; for OF_IMAGE 1 + scale."""
    scale = tl.load(scale_ptr + of_image, mask, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + of_image, mask, 0.0).to(tl.float32)
    return tl.where(mask, x * (scale + 1.0 if OF_IMAGE else scale) + shift, 0.0)


@Kernel
def _layer_norm_rows_kernel(
    x_ptr, scale_ptr, shift_ptr, branch_ptr, gate_ptr, sum_ptr, y_ptr, q_ptr, q_scale_ptr, factor_ptr,
    rows, tokens, width, eps,
    OF_IMAGE: tl.constexpr, HAS_BRANCH: tl.constexpr, WRITES_Y: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """MAIN, REST: as in quantize_rows.py. factor: 1 / scale of all rows; None if each row has its own scale, which is
    then written.
    """
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start, mask = row[:, None] * width, (row < rows)[:, None]
    image = (row // tokens)[:, None] * width if OF_IMAGE else tl.zeros((BLOCK_ROWS, 1), tl.int64)
    d = tl.arange(0, MAIN)[None, :]
    x = _load_sum(x_ptr, branch_ptr, gate_ptr, sum_ptr, start + d, image + d, mask, HAS_BRANCH)
    mean = tl.sum(x, 1)
    if REST:
        rest_d = MAIN + tl.arange(0, REST)[None, :]
        rest_mask = mask & (rest_d < width)
        rest = _load_sum(x_ptr, branch_ptr, gate_ptr, sum_ptr, start + rest_d, image + rest_d, rest_mask, HAS_BRANCH)
        mean += tl.sum(rest, 1)
    mean /= width
    x -= mean[:, None]
    variance = tl.sum(x * x, 1)
    if REST:
        rest = tl.where(rest_mask, rest - mean[:, None], 0.0)
        variance += tl.sum(rest * rest, 1)
    rstd = tl.rsqrt(variance / width + eps)[:, None]
    y = _modulated(x * rstd, scale_ptr, shift_ptr, image + d, mask, OF_IMAGE)
    if REST:
        rest_y = _modulated(rest * rstd, scale_ptr, shift_ptr, image + rest_d, rest_mask, OF_IMAGE)
    if factor_ptr is None:
        largest = tl.max(magnitude(y), 1)
        if REST:
            largest = tl.maximum(largest, tl.max(magnitude(rest_y), 1))
        q_scale, inverse = scale_and_inverse(largest, TYPE)
        tl.store(q_scale_ptr + row, q_scale, row < rows)
    else:
        inverse = tl.zeros((BLOCK_ROWS,), tl.float32) + tl.load(factor_ptr)
    tl.store(q_ptr + start + d, to_8_bit(y, inverse[:, None], TYPE), mask)
    if WRITES_Y:
        tl.store(y_ptr + start + d, y.to(y_ptr.dtype.element_ty), mask)
    if REST:
        if WRITES_Y:
            tl.store(y_ptr + start + rest_d, rest_y.to(y_ptr.dtype.element_ty), rest_mask)
        tl.store(q_ptr + start + rest_d, to_8_bit(rest_y, inverse[:, None], TYPE), rest_mask)


def launch_layer_norm_rows(x, scale, shift, eps, branch, gate, dtype):
    total, _, *rows = _launch(x, scale, shift, eps, branch, gate, None, dtype)
    return total, *rows


def launch_layer_norm_and_rows(x, scale, shift, eps, branch, gate, dtype, rows_dtype):
    return _launch(x, scale, shift, eps, branch, gate, torch.empty_like(x, dtype=dtype), rows_dtype)


def launch_bounded_layer_norm(x, scale, shift, eps, factor):
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _norm(x, scale, shift, eps, None, None, None, None, q, None, factor)
    return q


def _launch(x, scale, shift, eps, branch, gate, y, dtype):
    """y: where to write the results in another type, None for nowhere."""
    if branch is None:
        total = x.new_empty(0)
    else:
        total = torch.empty_like(x, dtype=torch.promote_types(promoted(x, branch), gate.dtype))
    q, q_scale = empty_rows(x, x.shape[2], dtype)
    _norm(x, scale, shift, eps, branch, gate, total, y, q, q_scale, None)
    return total, y, q, q_scale


def _norm(x, scale, shift, eps, branch, gate, total, y, q, q_scale, factor):
    images, tokens, width = x.shape
    (main, rest), rows = parts_of(width), images * tokens
    block_rows = 16 if INTERPRETED else 1  # the interpreter takes the same time for any tile
    _layer_norm_rows_kernel[(cdiv(rows, block_rows),)](
        x, scale, shift, branch, gate, total, y, q, q_scale, factor, rows, tokens, width, eps,
        OF_IMAGE=scale.dim() == 2, HAS_BRANCH=branch is not None, WRITES_Y=y is not None,
        BLOCK_ROWS=block_rows, MAIN=main, REST=rest, num_warps=min(16, next_power_of_2(cdiv(width, WIDTH_OF_A_WARP))),
    )  # fmt: skip
