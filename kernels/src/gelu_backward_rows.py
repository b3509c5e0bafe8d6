"""GELU and its gradient, rounded to 8-bit rows, in one pass; and sums of the gradient down its columns, in fp32.

A program computes whole rows, each in two parts whose widths are powers of two, as in quantize_rows.py.
"""

import torch
import triton
import triton.language as tl

from .common import persistent_splits
from .launch import Kernel
from .quantize_rows import approximate_tanh, empty_rows, magnitude, parts_of, scale_and_inverse, to_8_bit

RESIDENT = 2 * 4096  # main columns of the programs that a multiprocessor has registers for


@triton.jit
def _dh_and_g(dg_ptr, h_ptr, place, mask):
    """With t = tanh(√(2/π) (h + 0.044715 h³)): g = h (1 + t) / 2 and dh = dg · gelu'(h)."""
    h = tl.load(h_ptr + place, mask, 0.0).to(tl.float32)
    square = h * h
    t = approximate_tanh(h * (0.7978845608028654 + 0.035677408136300125 * square))
    factor = 0.5 + 0.5 * t
    slope = factor + h * (0.7978845608028654 + 0.10703222440890037 * square) * (0.5 - 0.5 * t * t)
    return tl.load(dg_ptr + place, mask, 0.0).to(tl.float32) * slope, h * factor


@triton.jit
def _store(ptr, q_ptr, x, place, mask, inverse, IN_HALF: tl.constexpr, IN_8_BIT: tl.constexpr):
    if IN_HALF:
        tl.store(ptr + place, x.to(ptr.dtype.element_ty), mask)
    if IN_8_BIT:
        tl.store(q_ptr + place, to_8_bit(x, inverse, q_ptr.dtype.element_ty), mask)


@Kernel
def _gelu_backward_rows_kernel(
    dg_ptr, h_ptr, dh_ptr, dh_q_ptr, dh_scale_ptr, g_ptr, g_q_ptr, g_scale_ptr, partial_ptr, rows, width,
    EVERYTHING: tl.constexpr, WANTS_G: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Each program computes every n-th row for n programs. partial: [programs, width], partial sums of dh over rows.
    TWICE: the second part of a row is computed again for its rounding, since registers do not suffice for both parts.
    """
    column, rest_column = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 1)
    everywhere, rest_mask = column < MAIN, rest_column < width
    G_IN_HALF: tl.constexpr = WANTS_G and not EVERYTHING
    G_IN_8_BIT: tl.constexpr = WANTS_G and EVERYTHING
    total = tl.zeros((MAIN,), tl.float32)
    if REST:
        rest_total = tl.zeros((REST,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64) * width
        dh, g = _dh_and_g(dg_ptr, h_ptr, start + column, everywhere)
        largest, g_largest = tl.max(magnitude(dh), 0), tl.max(magnitude(g), 0)
        total += dh
        if REST:
            rest_dh, rest_g = _dh_and_g(dg_ptr, h_ptr, start + rest_column, rest_mask)
            largest = tl.maximum(largest, tl.max(magnitude(rest_dh), 0))
            g_largest = tl.maximum(g_largest, tl.max(magnitude(rest_g), 0))
            rest_total += rest_dh
        scale, inverse = scale_and_inverse(largest, dh_q_ptr.dtype.element_ty)
        tl.store(dh_scale_ptr + row, scale)
        g_scale, g_inverse = scale_and_inverse(g_largest, g_q_ptr.dtype.element_ty)
        if G_IN_8_BIT:
            tl.store(g_scale_ptr + row, g_scale)
        _store(dh_ptr, dh_q_ptr, dh, start + column, everywhere, inverse, not EVERYTHING, True)
        _store(g_ptr, g_q_ptr, g, start + column, everywhere, g_inverse, G_IN_HALF, G_IN_8_BIT)
        if REST:
            if TWICE:
                rest_dh, rest_g = _dh_and_g(dg_ptr, h_ptr, start + rest_column, rest_mask)
            _store(dh_ptr, dh_q_ptr, rest_dh, start + rest_column, rest_mask, inverse, not EVERYTHING, True)
            _store(g_ptr, g_q_ptr, rest_g, start + rest_column, rest_mask, g_inverse, G_IN_HALF, G_IN_8_BIT)
    partial = partial_ptr + tl.program_id(0).to(tl.int64) * width
    tl.store(partial + column, total)
    if REST:
        tl.store(partial + rest_column, rest_total, rest_mask)


def launch_gelu_backward_rows(dg, h, act, dtype, everything, wants_g):
    width = h.shape[-1]
    rows, empty, format = h.numel() // width, h.new_empty(0), torch.float8_e4m3fn
    dh, g = empty if everything else torch.empty_like(h), torch.empty_like(h) if wants_g and not everything else empty
    dh_rows = empty_rows(h, width, dtype)
    g_rows = empty_rows(h, width, format) if wants_g and everything else (empty.to(format), empty.float())
    main, rest = parts_of(width)
    programs = persistent_splits(h, rows, per_processor=max(1, RESIDENT // main))
    partial = torch.empty(programs, width, dtype=torch.float32, device=h.device)
    _gelu_backward_rows_kernel[(programs,)](
        dg, h, dh, *dh_rows, g, *g_rows, partial, rows, width,
        EVERYTHING=everything, WANTS_G=wants_g, MAIN=main, REST=rest, TWICE=main + rest > 8192,
        num_warps=min(16, max(4, main // 256)),
    )  # fmt: skip
    return dh, *dh_rows, g, *g_rows, partial.sum(0)
