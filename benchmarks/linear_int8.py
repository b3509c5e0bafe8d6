"""A linear layer of int8 rows as a Triton kernel for Hopper: a rival of `ops.linear_rows`, not in the package.

y = (x · weightᵀ) · x_scale · weight_scaleᵀ + bias + residual, as in dcae_fast/ops/linear_rows.py
"""

from typing import NamedTuple

import torch
import triton.language as tl
from dcae_fast.kernels.common import cdiv, persistent_splits
from dcae_fast.kernels.conv2d_int8 import _parts
from dcae_fast.kernels.launch import Kernel
from triton.tools.tensor_descriptor import TensorDescriptor

COLUMNS = 64  # that the epilogue computes at a time


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    programs: int = 1  # on a multiprocessor


TILES = (
    Tile(128, 256, 128, 3, 8),
    Tile(128, 256, 128, 4, 8),
    Tile(256, 128, 128, 3, 8),
    Tile(128, 128, 128, 4, 8),
    Tile(128, 128, 128, 3, 4, programs=2),
    Tile(64, 256, 128, 4, 4),
)


@Kernel
def _linear_int8_kernel(
    x_desc, weight_desc, residual_desc, out_desc, x_scale_ptr, weight_scale_ptr, bias_ptr, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP: blocks of rows that are computed one after the other for a block of columns, so that both stay in L2."""
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    blocks_m, blocks_n, steps = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), tl.cdiv(depth, BLOCK_K)
    tl.assume(steps > 0)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True):
        group = tile // (GROUP * blocks_n)
        size = tl.minimum(blocks_m - group * GROUP, GROUP)
        first_m = (group * GROUP + tile % (GROUP * blocks_n) % size) * BLOCK_M
        first_n = tile % (GROUP * blocks_n) // size * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(steps):
            x = x_desc.load([first_m, step * BLOCK_K])
            weight = weight_desc.load([first_n, step * BLOCK_K])
            total = tl.dot(x, weight.T, total, out_dtype=tl.int32)
        m = first_m + tl.arange(0, BLOCK_M)
        x_scale = tl.load(x_scale_ptr + m, m < rows, 0.0)
        parts = _parts(total, PARTS)
        for part in tl.static_range(PARTS):
            first = first_n + part * COLUMNS
            n = first + tl.arange(0, COLUMNS)
            weight_scale = tl.load(weight_scale_ptr + n, n < columns, 0.0)
            y = parts[part].to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n, n < columns, 0.0).to(tl.float32)[None, :]
            if residual_desc is not None:
                y += residual_desc.load([first_m, first]).to(tl.float32)
            out_desc.store([first_m, first], y.to(out_desc.dtype))


def linear_int8(x, x_scale, weight, weight_scale, bias=None, residual=None, tile=TILES[0], dtype=torch.bfloat16):
    """x: [rows, depth]; weight: [columns, depth]; the scales [rows, 1] and [columns, 1]; residual: [rows, columns]."""
    (rows, depth), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    tiles = cdiv(rows, tile.rows) * cdiv(columns, tile.columns)

    def boxes(matrix, *box):
        return None if matrix is None else TensorDescriptor(matrix, [*matrix.shape], [matrix.shape[1], 1], list(box))

    _linear_int8_kernel[(persistent_splits(x, tiles, 1, tile.programs),)](
        boxes(x, tile.rows, tile.depth), boxes(weight, tile.columns, tile.depth),
        boxes(residual, tile.rows, COLUMNS), boxes(out, tile.rows, COLUMNS),
        x_scale, weight_scale, bias, rows, columns, depth,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, COLUMNS=COLUMNS, GROUP=8,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
