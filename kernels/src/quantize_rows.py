"""Rounds rows to 8 bit, each with its own scale, after an activation. A program computes whole rows.

A row is read in two parts whose widths are powers of two, so that few lanes lie beyond the usual widths: 1152 is
1024 + 128, 4608 is 4096 + 512.
"""

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, cdiv, next_power_of_2, sigmoid
from .launch import Kernel
from .quantize import to_int8

ELEMENTS = 4096  # of a tile, about


@triton.jit
def magnitude(x):
    """The bits of |x| as integers, which order numbers by size, with NaN above infinity. x: fp32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(largest, TYPE: tl.constexpr):
    """The scale of rows and 1 / scale, from the largest `magnitude` of each row; see ops/quantize_rows.py."""
    is_finite = largest < 0x7F800000
    if TYPE == tl.int8:
        scale = largest.to(tl.float32, bitcast=True) * (1 / 127)
        scale = tl.where(scale > 0.0, scale, 1.0)
        inverse = tl.div_rn(1.0, scale)
    else:
        MOST: tl.constexpr = 8 if TYPE == tl.float8e4nv else 15  # the largest number is 1.75 · 2^MOST
        exponent = (largest >> 23) - MOST + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
        exponent = tl.maximum(exponent, 1)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(is_finite, scale, float("nan")), tl.where(is_finite, inverse, float("nan"))


@triton.jit
def to_8_bit(x, inverse, TYPE: tl.constexpr):
    """x · inverse, rounded. x: fp32."""
    if TYPE == tl.int8:
        return to_int8(x, inverse)
    else:
        return (x * inverse).to(TYPE)


@triton.jit
def approximate_tanh(x):
    """With an error of about 2⁻¹¹, far below the rounding to 8 bit, in one instruction."""
    if INTERPRETED:
        return 2.0 * sigmoid(2.0 * x) - 1.0
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """GELU in its tanh form, x / 2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), or x."""
    if ACT == "none":
        return x
    else:
        half = 0.5 * x
        return half + half * approximate_tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x))


@Kernel
def _quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, rows, width,
    ACT: tl.constexpr, BLOCK_ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """MAIN: the width of the first part of a row, at most `width`; REST: of the second part, 0 if there is none."""
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start, row_mask = row[:, None] * width, (row < rows)[:, None]
    place = start + tl.arange(0, MAIN)[None, :]
    x = _activate(tl.load(x_ptr + place, row_mask, 0.0).to(tl.float32), ACT)
    largest = tl.max(magnitude(x), 1)
    if REST:
        column = MAIN + tl.arange(0, REST)
        rest_place, rest_mask = start + column[None, :], row_mask & (column < width)[None, :]
        rest = _activate(tl.load(x_ptr + rest_place, rest_mask, 0.0).to(tl.float32), ACT)
        largest = tl.maximum(largest, tl.max(magnitude(rest), 1))
    scale, inverse = scale_and_inverse(largest, TYPE)
    tl.store(scale_ptr + row, scale, row < rows)
    tl.store(q_ptr + place, to_8_bit(x, inverse[:, None], TYPE), row_mask)
    if REST:
        tl.store(q_ptr + rest_place, to_8_bit(rest, inverse[:, None], TYPE), rest_mask)


@Kernel
def _concatenate_rows_kernel(
    left_ptr, right_ptr, q_ptr, scale_ptr, rows, width,
    BLOCK_ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """width: of left and right."""
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask, column = (row < rows)[:, None], tl.arange(0, MAIN)[None, :]
    place = row[:, None] * width + column
    left = tl.load(left_ptr + place, row_mask, 0.0).to(tl.float32)
    right = tl.load(right_ptr + place, row_mask, 0.0).to(tl.float32)
    largest = tl.max(tl.maximum(magnitude(left), magnitude(right)), 1)
    if REST:
        rest_column = MAIN + tl.arange(0, REST)[None, :]
        rest_place, rest_mask = row[:, None] * width + rest_column, row_mask & (rest_column < width)
        left_rest = tl.load(left_ptr + rest_place, rest_mask, 0.0).to(tl.float32)
        right_rest = tl.load(right_ptr + rest_place, rest_mask, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.maximum(magnitude(left_rest), magnitude(right_rest)), 1))
    scale, inverse = scale_and_inverse(largest, TYPE)
    tl.store(scale_ptr + row, scale, row < rows)
    q_row = q_ptr + row[:, None] * (2 * width)
    tl.store(q_row + column, to_8_bit(left, inverse[:, None], TYPE), row_mask)
    tl.store(q_row + width + column, to_8_bit(right, inverse[:, None], TYPE), row_mask)
    if REST:
        tl.store(q_row + rest_column, to_8_bit(left_rest, inverse[:, None], TYPE), rest_mask)
        tl.store(q_row + width + rest_column, to_8_bit(right_rest, inverse[:, None], TYPE), rest_mask)


def parts_of(width: int) -> tuple[int, int]:
    """MAIN and REST of rows of this width: powers of two, or 0 for no rest."""
    main = 1 << (width.bit_length() - 1)
    return main, next_power_of_2(width - main) if width > main else 0


def row_blocks(width: int, elements: int = ELEMENTS) -> tuple[int, dict[str, int]]:
    """The rows of a program, and the constants of a kernel that computes rows of this width.

    elements: of a tile, about.
    """
    main, rest = parts_of(width)
    block_rows = max(1, elements // main)
    warps = min(16, max(4, next_power_of_2(block_rows * (main + rest) // 2048)))
    return block_rows, {"BLOCK_ROWS": block_rows, "MAIN": main, "REST": rest, "num_warps": warps}


def empty_rows(x: torch.Tensor, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised rows in 8 bit, as many as x has, and their scales."""
    q = torch.empty(*x.shape[:-1], width, dtype=dtype, device=x.device)
    return q, torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)


def launch_quantize_rows(x, act, dtype):
    width = x.shape[-1]
    q, scale = empty_rows(x, width, dtype)
    block_rows, blocks = row_blocks(width)
    rows = x.numel() // width
    _quantize_rows_kernel[(cdiv(rows, block_rows),)](x, q, scale, rows, width, ACT=act, **blocks)
    return q, scale


def launch_concatenate_rows(left, right, dtype):
    width = left.shape[-1]
    q, scale = empty_rows(left, 2 * width, dtype)
    block_rows, blocks = row_blocks(width, ELEMENTS // 2)  # a program reads two tiles
    rows = left.numel() // width
    _concatenate_rows_kernel[(cdiv(rows, block_rows),)](left, right, q, scale, rows, width, **blocks)
    return q, scale
