"""Linear layers of int8 rows: products of int8 with sums in int32, then scales, bias and residual in fp32.

A program computes one block of the result after the other. TMA loads the operands, with zeros beyond the last row,
column and depth, and stores the result without what lies beyond.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import cdiv, next_power_of_2, parts, persistent_splits
from .launch import Kernel

RULES = 1  # version of `TILES`, part of the name of the file that remembers which tile is the fastest
LINE = 128  # bytes of a row of the result that the epilogue computes at a time, so that shared memory suffices


class Tile(NamedTuple):
    """rows, columns: of the result. depth: of a step. programs: on a multiprocessor."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    programs: int = 1


TILES = (  # from many rows to few
    Tile(128, 256, 128, 3, 8),
    Tile(128, 256, 128, 4, 8),
    Tile(256, 128, 128, 3, 8),
    Tile(128, 128, 128, 4, 8),
    Tile(128, 128, 128, 3, 4, programs=2),
    Tile(64, 256, 128, 4, 4),
    Tile(64, 128, 128, 3, 4, programs=2),
    Tile(64, 128, 128, 4, 4, programs=2),
    Tile(128, 64, 128, 3, 4, programs=2),
    Tile(64, 64, 128, 3, 4, programs=3),
    Tile(64, 32, 128, 8, 4, programs=2),
)


@Kernel
def _linear_rows_kernel(
    x_desc, weight_desc, residual_desc, out_desc, x_scale_ptr, weight_scale_ptr, bias_ptr, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP: blocks of rows that are computed one after the other for a block of columns, so that both stay in L2.

    COLUMNS: of a block that the epilogue computes at a time.
    """
    PARTS: tl.constexpr = BLOCK_N // COLUMNS
    blocks_m, blocks_n, steps = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), tl.cdiv(depth, BLOCK_K)
    tl.assume(steps > 0)
    for block in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True):
        group = block // (GROUP * blocks_n)
        size = tl.minimum(blocks_m - group * GROUP, GROUP)
        first_m = (group * GROUP + block % (GROUP * blocks_n) % size) * BLOCK_M
        first_n = block % (GROUP * blocks_n) // size * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for step in range(steps):
            x = x_desc.load([first_m, step * BLOCK_K])
            weight = weight_desc.load([first_n, step * BLOCK_K])
            total = tl.dot(x, weight.T, total, out_dtype=tl.int32)
        m = first_m + tl.arange(0, BLOCK_M)
        x_scale = tl.load(x_scale_ptr + m, m < rows, 0.0)
        totals = parts(total, PARTS)
        for part in tl.static_range(PARTS):
            first = first_n + part * COLUMNS
            n = first + tl.arange(0, COLUMNS)
            weight_scale = tl.load(weight_scale_ptr + n, n < columns, 0.0)
            y = totals[part].to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + n, n < columns, 0.0).to(tl.float32)[None, :]
            if residual_desc is not None:
                y += residual_desc.load([first_m, first]).to(tl.float32)
            out_desc.store([first_m, first], y.to(out_desc.dtype))


def _blocks(tile: Tile, rows: int, columns: int) -> int:
    return cdiv(rows, tile.rows) * cdiv(columns, tile.columns)


@functools.lru_cache(maxsize=512)
def tiles_of(rows: int, columns: int, depth: int, processors: int) -> tuple[Tile, ...]:
    """The tiles to choose from, made smaller where the layer is smaller.

    The first is for calls that are not timed: the largest that gives each multiprocessor a block, else the smallest.
    """
    most = max(64, next_power_of_2(rows)), max(32, next_power_of_2(columns)), max(32, next_power_of_2(depth))
    tiles = tuple(dict.fromkeys(Tile(*map(min, tile[:3], most), *tile[3:]) for tile in TILES))
    first = next((tile for tile in tiles if _blocks(tile, rows, columns) >= processors), tiles[-1])
    return first, *(tile for tile in tiles if tile != first)


def tiles_version() -> str:
    """Differs where another tile may be the fastest."""
    return f"{triton.__version__}-{RULES}"


def _matrix(matrix: torch.Tensor | None, rows: int, *box: int) -> TensorDescriptor | None:
    """Describes contiguous rows that are accessed in boxes; None for None."""
    if matrix is None:
        return None
    width = matrix.numel() // rows
    return TensorDescriptor(matrix, [rows, width], [width, 1], list(box))


def launch_linear_rows(x, x_scale, weight, weight_scale, bias, residual, dtype, tile):
    columns, depth = weight.shape
    rows = x.numel() // depth
    out = torch.empty(*x.shape[:-1], columns, dtype=dtype, device=x.device)
    width = min(tile.columns, LINE // out.element_size())
    _linear_rows_kernel[(persistent_splits(x, _blocks(tile, rows, columns), 1, tile.programs),)](
        _matrix(x, rows, tile.rows, tile.depth), _matrix(weight, columns, tile.columns, tile.depth),
        _matrix(residual, rows, tile.rows, width), _matrix(out, rows, tile.rows, width),
        x_scale, weight_scale, bias, rows, columns, depth,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, COLUMNS=width, GROUP=8,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out
