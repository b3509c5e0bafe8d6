"""Concatenates two matrices of one shape along columns, in another dtype; and splits them again."""

import torch
import triton
import triton.language as tl

from .common import cdiv, row_tile
from .launch import Kernel


@triton.jit
def _tile(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """For this program: offsets in a half, offsets of the left half in the whole, and the mask of valid elements."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return row[:, None] * columns + column[None, :], row[:, None] * (2 * columns) + column[None, :], mask


@Kernel
def _concatenate_kernel(
    left_ptr, right_ptr, whole_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    half, whole, mask = _tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    left, right = tl.load(left_ptr + half, mask), tl.load(right_ptr + half, mask)
    tl.store(whole_ptr + whole, left.to(whole_ptr.dtype.element_ty), mask)
    tl.store(whole_ptr + columns + whole, right.to(whole_ptr.dtype.element_ty), mask)


@Kernel
def _concatenate_backward_kernel(
    whole_ptr, left_ptr, right_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    half, whole, mask = _tile(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    left, right = tl.load(whole_ptr + whole, mask), tl.load(whole_ptr + columns + whole, mask)
    tl.store(left_ptr + half, left.to(left_ptr.dtype.element_ty), mask)
    tl.store(right_ptr + half, right.to(right_ptr.dtype.element_ty), mask)


def _launch(kernel, tensors, half):
    columns = half.shape[-1]
    if half.numel():
        rows, (block_rows, block_columns) = half.numel() // columns, row_tile(columns, 2048, elements=8192)
        kernel[(cdiv(rows, block_rows), cdiv(columns, block_columns))](
            *tensors, rows, columns, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns
        )


def launch_concatenate(left, right, dtype):
    whole = torch.empty(*left.shape[:-1], 2 * left.shape[-1], dtype=dtype, device=left.device)
    _launch(_concatenate_kernel, (left, right, whole), left)
    return whole


def launch_concatenate_backward(whole, left_dtype, right_dtype):
    shape = *whole.shape[:-1], whole.shape[-1] // 2
    left, right = (torch.empty(shape, dtype=dtype, device=whole.device) for dtype in (left_dtype, right_dtype))
    _launch(_concatenate_backward_kernel, (whole, left, right), left)
    return left, right
