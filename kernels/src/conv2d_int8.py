"""Convolutions of int8 images with stride 1, as products of int8 with sums in int32.

For each tap of the window and each block of channels, a tile of positions is one box of the image, moved by the tap.
TMA loads it, with zeros where the box leaves the image: the padding. The window is 3 × 3, 1 × 1, or 2 × 2 for the four
parities of the pixels of an up-sampled image, which are planes of the result, one after the other.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import activate, cdiv, like_channels_last, next_power_of_2, parts, persistent_splits
from .launch import Kernel
from .quantize import to_int8

RULES = 1  # version of `TILES`, part of the name of the file that remembers which tile is the fastest
COLUMNS = 64  # filters that the epilogue computes at a time, so that registers and shared memory suffice


class Tile(NamedTuple):
    """rows, columns: of a box of positions. channels: of a step. programs: on a multiprocessor."""

    rows: int
    columns: int
    filters: int
    channels: int
    stages: int
    warps: int
    programs: int = 1


TILES = (  # the first is the fastest for many large images, the last ones are for few small images
    Tile(8, 16, 256, 128, 3, 8),
    Tile(8, 16, 256, 128, 4, 8),
    Tile(16, 16, 128, 128, 3, 8),
    Tile(8, 32, 128, 128, 3, 8),
    Tile(8, 16, 128, 128, 4, 8),
    Tile(8, 8, 256, 128, 4, 4),
    Tile(8, 8, 128, 128, 3, 4, programs=2),
)


@Kernel
def _conv2d_int8_kernel(
    x_desc, weight_desc, residual_desc, out_desc, quantized_desc, scale_ptr, bias_ptr, factor_ptr,
    batch, height, width, channels, filters,
    SIDE: tl.constexpr, PARITIES: tl.constexpr, ACT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """SIDE: of the window. A row of the weight has SIDE² · channels elements; the weights of the parities lie one after
    the other. Rows and columns beyond the image, filters and channels beyond the last are neither read nor written.
    """
    TAPS: tl.constexpr = SIDE * SIDE
    P: tl.constexpr = TILE_H * TILE_W
    PARTS: tl.constexpr = BLOCK_K // COLUMNS
    tiles_h, tiles_w = tl.cdiv(height, TILE_H), tl.cdiv(width, TILE_W)
    blocks_k, steps = tl.cdiv(filters, BLOCK_K), tl.cdiv(channels, BLOCK_C) * TAPS
    tl.assume(steps > 0)
    tiles = PARITIES * batch * tiles_h * tiles_w * blocks_k
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_k = tile % blocks_k * BLOCK_K
        parity = tile // blocks_k % PARITIES
        box = tile // blocks_k // PARITIES
        h, w = box // tiles_w % tiles_h * TILE_H, box % tiles_w * TILE_W
        image = box // tiles_w // tiles_h
        first_h, first_w = h - SIDE // 2 + parity // 2, w - SIDE // 2 + parity % 2
        total = tl.zeros((P, BLOCK_K), tl.int32)
        for step in range(steps):
            tap, c = step % TAPS, step // TAPS * BLOCK_C
            x = x_desc.load([image, first_h + tap // SIDE, first_w + tap % SIDE, c])
            weight = weight_desc.load([parity * filters + first_k, tap * channels + c])
            total = tl.dot(tl.reshape(x, (P, BLOCK_C)), weight.T, total, out_dtype=tl.int32)
        sums = parts(total, PARTS)
        for part in tl.static_range(PARTS):
            first = first_k + part * COLUMNS
            k = first + tl.arange(0, COLUMNS)
            scale = tl.load(scale_ptr + parity * filters + k, k < filters, 0.0)
            y = sums[part].to(tl.float32) * scale[None, :]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + k, k < filters, 0.0).to(tl.float32)[None, :]
            y = activate(y, ACT)
            place = [parity * batch + image, h, w, first]
            if residual_desc is not None:
                y += tl.reshape(residual_desc.load(place), (P, COLUMNS)).to(tl.float32)
            if out_desc is not None:
                out_desc.store(place, tl.reshape(y.to(out_desc.dtype), (1, TILE_H, TILE_W, COLUMNS)))
            if quantized_desc is not None:
                q = to_int8(y, tl.load(factor_ptr + k, k < filters, 0.0)[None, :])
                quantized_desc.store(place, tl.reshape(q, (1, TILE_H, TILE_W, COLUMNS)))


def tiles_of(weight: torch.Tensor) -> list[Tile]:
    """The tiles to choose from, in the order of `TILES`, made smaller where the weight has few filters or channels."""
    most_filters = max(16, next_power_of_2(weight.shape[0] // _parities(weight)))
    most_channels = max(32, next_power_of_2(weight.shape[1]))
    fitted = (
        tile._replace(filters=min(tile.filters, most_filters), channels=min(tile.channels, most_channels))
        for tile in TILES
    )
    return list(dict.fromkeys(fitted))


def tiles_version() -> str:
    """Differs where another tile may be the fastest."""
    return f"{triton.__version__}-{RULES}"


def _parities(weight: torch.Tensor) -> int:
    """The number of planes that the weight computes: 4 if its windows are 2 × 2."""
    return 4 if weight.shape[2] == 2 else 1


def _boxes(images, shape, box):
    """Describes channels-last images of this shape, [B, H, W, C], that are accessed in boxes; None for None."""
    if images is None:
        return None
    _, height, width, channels = shape
    strides = [height * width * channels, width * channels, channels, 1]
    return TensorDescriptor(images, list(shape), strides, list(box))


def launch_conv2d_int8(x, weight, scale, bias, act, residual, dtype, out_factor, tile):
    """The wanted results: of type `dtype` unless dtype is None, then int8 unless out_factor is None."""
    (batch, channels, height, width), parities, side = x.shape, _parities(weight), weight.shape[2]
    filters, row = weight.shape[0] // parities, side**2 * channels
    shape = parities * batch, filters, height, width
    out = None if dtype is None else like_channels_last(x, shape, dtype)
    quantized = None if out_factor is None else like_channels_last(x, shape)
    if side == 1:  # all positions in one row
        batch, height, width = 1, 1, batch * height * width
        tile = tile._replace(rows=1, columns=tile.rows * tile.columns)
    planes = parities * batch
    tiles = planes * cdiv(height, tile.rows) * cdiv(width, tile.columns)
    tiles *= cdiv(filters, tile.filters)
    columns = min(COLUMNS, tile.filters)
    _conv2d_int8_kernel[(persistent_splits(x, tiles, 1, tile.programs),)](
        _boxes(x, (batch, height, width, channels), (1, tile.rows, tile.columns, tile.channels)),
        TensorDescriptor(weight, [weight.shape[0], row], [row, 1], [tile.filters, tile.channels]),
        *(
            _boxes(tensor, (planes, height, width, filters), (1, tile.rows, tile.columns, columns))
            for tensor in (residual, out, quantized)
        ),
        scale, bias, out_factor, batch, height, width, channels, filters,
        SIDE=side, PARITIES=parities, ACT=act, TILE_H=tile.rows, TILE_W=tile.columns, BLOCK_K=tile.filters,
        BLOCK_C=tile.channels, COLUMNS=columns, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return [result for result in (out, quantized) if result is not None]
