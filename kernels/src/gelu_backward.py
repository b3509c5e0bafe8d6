"""GELU and its gradient in one pass over a matrix, and sums of the gradient down its columns, in fp32."""

import math

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, cdiv, persistent_splits, sigmoid
from .launch import Kernel

DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
TWICE_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)
CUBIC_SLOPE = tl.constexpr(3 * 0.044715)
BLOCK_ROWS, BLOCK_COLUMNS = (32 if INTERPRETED else 2), 512  # the interpreter takes the same time for any tile


@triton.jit
def _normal(x):
    """Distribution function, with an error below 7.5e-8, and density of the standard normal distribution.

    Source: Abramowitz & Stegun, 26.2.17. Both share the exponential; with erf the kernel would no longer be limited by
    memory.
    """
    density = DENSITY * tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
    series = 0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429)))
    tail = density * t * series
    return tl.where(x < 0.0, tail, 1.0 - tail), density


@Kernel
def _gelu_backward_kernel(
    dg_ptr, h_ptr, dh_ptr, g_ptr, partial_ptr, rows, columns,
    TANH: tl.constexpr, WANTS_G: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of columns, splits of the rows). partial: [splits, columns], partial sums of dh over rows."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_mask = column < columns
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(1)):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & column_mask[None, :]
        offset = row[:, None] * columns + column[None, :]
        h = tl.load(h_ptr + offset, mask, 0.0).to(tl.float32)
        dg = tl.load(dg_ptr + offset, mask, 0.0).to(tl.float32)
        if TANH:  # (1 + tanh(z)) / 2 = sigmoid(2 z)
            cdf = sigmoid(h * TWICE_SLOPE * (1.0 + h * h * CUBIC))
            slope = cdf + h * cdf * (1.0 - cdf) * TWICE_SLOPE * (1.0 + h * h * CUBIC_SLOPE)
        else:
            cdf, density = _normal(h)
            slope = cdf + h * density
        dh = (dg * slope).to(dh_ptr.dtype.element_ty)
        tl.store(dh_ptr + offset, dh, mask)
        if WANTS_G:
            tl.store(g_ptr + offset, (h * cdf).to(g_ptr.dtype.element_ty), mask)
        total += tl.sum(dh.to(tl.float32), 0)
    tl.store(partial_ptr + tl.program_id(1) * columns + column, total, column_mask)


def launch_gelu_backward(dg, h, act, wants_g):
    columns = h.shape[-1]
    rows = h.numel() // max(columns, 1)
    dh, g = torch.empty_like(h), torch.empty_like(h) if wants_g else h.new_empty(0)
    blocks = cdiv(columns, BLOCK_COLUMNS)
    splits = persistent_splits(h, cdiv(rows, BLOCK_ROWS), blocks, per_processor=16)
    partial = torch.empty(splits, columns, dtype=torch.float32, device=h.device)
    if h.numel():
        _gelu_backward_kernel[(blocks, splits)](
            dg, h, dh, g, partial, rows, columns,
            TANH=act == "gelu_tanh", WANTS_G=wants_g, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS, num_warps=2,
        )  # fmt: skip
    return dh, g, partial.sum(0)
