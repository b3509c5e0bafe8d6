"""Transposes a matrix while rounding its columns to 8 bit, and transposes 8-bit rows to a common scale."""

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, cdiv, persistent_splits
from .launch import Kernel
from .quantize_rows import empty_rows, magnitude, scale_and_inverse, to_8_bit

MULTIPLE = 16  # of the columns of transposed rows
BLOCK_ROWS, BLOCK_COLUMNS = 128, 64
BLOCK_BYTES = 128  # columns of a tile of 8-bit rows
SPLITS = 1 if INTERPRETED else 64  # at most, of the rows for the largest numbers of columns


@Kernel
def _largest_kernel(
    x_ptr, partial_ptr, rows, columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial: [splits, columns], the largest `magnitude` in the rows of a split. The grid is (columns, splits)."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    largest = tl.zeros((BLOCK_COLUMNS,), tl.int32)
    for block in range(tl.program_id(1), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(1)):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude(x), 0))
    tl.store(partial_ptr + tl.program_id(1) * columns + column, largest, column < columns)


@Kernel
def _quantize_columns_kernel(
    x_ptr, partial_ptr, q_ptr, scale_ptr, rows, columns, splits,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """partial: as `_largest_kernel` writes it. The grid is (columns, rows)."""
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    split = tl.arange(0, SPLITS)
    known = (split < splits)[:, None] & (column < columns)[None, :]
    largest = tl.max(tl.load(partial_ptr + split[:, None] * columns + column[None, :], known, 0), 0)
    scale, inverse = scale_and_inverse(largest, TYPE)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + column, scale, column < columns)
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask, 0.0).to(tl.float32)
    _store_transposed(q_ptr, to_8_bit(x, inverse[None, :], TYPE), row, column, columns, rows)


@triton.jit
def _store_transposed(q_ptr, q, row, column, columns, out_columns):
    """out_columns: the rows, with those that are added to them."""
    place = column.to(tl.int64)[:, None] * out_columns + row[None, :]
    tl.store(q_ptr + place, tl.trans(q), (column < columns)[:, None] & (row < out_columns)[None, :])


@Kernel
def _transpose_rows_kernel(
    q_ptr, scale_ptr, common_ptr, out_ptr, rows, columns, out_columns,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """common: one number, the largest scale. The grid has one dimension, since the others have at most 65535 programs,
    and tokens may be more than these compute.
    """
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    column = tl.program_id(0) % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    factor = tl.div_rn(tl.load(scale_ptr + row, row < rows, 0.0), tl.load(common_ptr))
    q = tl.load(q_ptr + row[:, None] * columns + column[None, :], mask, 0.0)
    q = to_8_bit(q.to(tl.float32), factor[:, None], out_ptr.dtype.element_ty)
    _store_transposed(out_ptr, q, row, column, columns, out_columns)


def launch_quantize_columns(x, dtype):
    rows, columns = x.shape
    blocks = cdiv(columns, BLOCK_COLUMNS)
    splits = min(SPLITS, persistent_splits(x, cdiv(rows, BLOCK_ROWS), blocks))
    partial = torch.empty(splits, columns, dtype=torch.int32, device=x.device)
    tile = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS, "num_warps": 8}
    _largest_kernel[(blocks, splits)](x, partial, rows, columns, **tile)
    q, scale = empty_rows(x.T, rows, dtype)
    tile = {"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS, "SPLITS": SPLITS, "num_warps": 8}
    _quantize_columns_kernel[(blocks, cdiv(rows, BLOCK_ROWS))](x, partial, q, scale, rows, columns, splits, **tile)
    return q, scale


def launch_transpose_rows(q, scale):
    columns = q.shape[-1]
    rows, common = q.numel() // columns, scale.amax()
    out = torch.empty(columns, cdiv(rows, MULTIPLE) * MULTIPLE, dtype=q.dtype, device=q.device)
    programs = cdiv(columns, BLOCK_BYTES) * cdiv(out.shape[1], BLOCK_ROWS)
    _transpose_rows_kernel[(programs,)](
        q, scale, common, out, rows, columns, out.shape[1],
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_BYTES, num_warps=8,
    )  # fmt: skip
    return out, common.expand(columns, 1).contiguous()
