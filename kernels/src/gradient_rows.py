"""Rounds a gradient to 8-bit rows and to half precision, and sums it down its columns, in one pass.

A program computes whole rows, each in two parts whose widths are powers of two, as in quantize_rows.py.
"""

import torch
import triton
import triton.language as tl

from .common import persistent_splits
from .launch import Kernel
from .quantize_rows import empty_rows, magnitude, parts_of, scale_and_inverse, to_8_bit


@triton.jit
def _store(half_ptr, q_ptr, x, place, mask, inverse, WANTS_HALF: tl.constexpr):
    if WANTS_HALF:
        tl.store(half_ptr + place, x.to(half_ptr.dtype.element_ty), mask)
    tl.store(q_ptr + place, to_8_bit(x, inverse, q_ptr.dtype.element_ty), mask)


@Kernel
def _gradient_rows_kernel(
    dy_ptr, half_ptr, q_ptr, scale_ptr, partial_ptr, rows, width,
    WANTS_HALF: tl.constexpr, WANTS_SUM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Each program computes every n-th row for n programs. partial: [programs, width], partial sums of dy over rows."""
    column, rest_column = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1)
    everywhere, rest_mask = column < MAIN, rest_column < width
    total = tl.zeros((MAIN,), tl.float32)
    if REST:
        rest_total = tl.zeros((REST,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * width
        dy = tl.load(dy_ptr + start + column).to(tl.float32)
        largest = tl.max(magnitude(dy), 0)
        total += dy
        if REST:
            rest = tl.load(dy_ptr + start + rest_column, rest_mask, 0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(magnitude(rest), 0))
            rest_total += rest
        scale, inverse = scale_and_inverse(largest, q_ptr.dtype.element_ty)
        tl.store(scale_ptr + row, scale)
        _store(half_ptr, q_ptr, dy, start + column, everywhere, inverse, WANTS_HALF)
        if REST:
            _store(half_ptr, q_ptr, rest, start + rest_column, rest_mask, inverse, WANTS_HALF)
    if WANTS_SUM:
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * width
        tl.store(partial + column, total)
        if REST:
            tl.store(partial + rest_column, rest_total, rest_mask)


def launch_gradient_rows(dy, dtype, rows_dtype, wants_half, wants_sum):
    width = dy.shape[-1]
    rows = dy.numel() // width
    half = torch.empty_like(dy, dtype=dtype) if wants_half else dy.new_empty(0, dtype=dtype)
    q, scale = empty_rows(dy, width, rows_dtype)
    main, rest = parts_of(width)
    programs = persistent_splits(dy, rows, per_processor=16 if main <= 2048 else 4)
    partial = torch.empty(programs if wants_sum else 0, width, dtype=torch.float32, device=dy.device)
    _gradient_rows_kernel[(programs,)](
        dy, half, q, scale, partial, rows, width,
        WANTS_HALF=wants_half, WANTS_SUM=wants_sum, MAIN=main, REST=rest, num_warps=min(16, max(2, main // 512)),
    )  # fmt: skip
    return half, q, scale, partial.sum(0) if wants_sum else dy.new_empty(0, dtype=torch.float32)
