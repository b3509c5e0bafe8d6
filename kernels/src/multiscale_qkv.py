"""Depthwise k×k convolution and grouped 1×1 convolution in one pass: [B, C, H, W] → [B, C, H, W], groups of D channels.

A program computes the D channels of a group on a tile of pixels. It adds up the taps in fp32 and multiplies by the
group's D × D matrix. The halo comes from the cache.

The gradient takes one pass for the grouped convolution, which stores the gradient of the depthwise result, and one pass
each for the input and the taps. Sums over pixels are written once for each split of the tiles and added afterwards.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, like_channels_last, persistent_splits
from .launch import Kernel

TILE = {"ROWS": 8, "COLUMNS": 16}  # forward
BACKWARD_TILE = {"ROWS": 8, "COLUMNS": 8}
PER_PROCESSOR = 12  # programs that sum over pixels; three or four of them run at a time


@triton.jit
def _tile(tile, height, width, tiles_y, tiles_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First pixel of the image, rows and columns of a tile's pixels, and which of them are inside the image."""
    p = tl.arange(0, ROWS * COLUMNS)
    row = tile // tiles_x % tiles_y * ROWS + p // COLUMNS
    column = tile % tiles_x * COLUMNS + p % COLUMNS
    image = (tile // (tiles_x * tiles_y)).to(tl.int64) * height * width
    return image, row, column, ((row < height) & (column < width))[:, None]


@triton.jit
def _pixels(x_ptr, image, row, column, c, height, width, channels):
    """Channels c of x at these pixels in fp32, zero outside of the image."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = (image + row * width + column)[:, None] * channels + c[None, :]
    return tl.load(x_ptr + offset, inside[:, None], 0.0).to(tl.float32)


@triton.jit
def _depthwise(
    x_ptr, taps_ptr, image, row, column, c, height, width, channels,
    K: tl.constexpr, FLIP: tl.constexpr, PIXELS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sum over the taps, in fp32. taps: [K * K, channels]. FLIP: transposed convolution."""
    total = tl.zeros((PIXELS, D), tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            x = _pixels(x_ptr, image, row + i - K // 2, column + j - K // 2, c, height, width, channels)
            tap = K * K - 1 - (i * K + j) if FLIP else i * K + j
            total += x * tl.load(taps_ptr + tap * channels + c).to(tl.float32)[None, :]
    return total


@Kernel
def _multiscale_qkv_kernel(
    x_ptr, taps_ptr, grouped_ptr, out_ptr, height, width, channels, tiles_y, tiles_x,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs are numbered by (image, row, column, group), so that neighbours share cache lines."""
    groups = channels // D
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    image, row, column, mask = _tile(tile, height, width, tiles_y, tiles_x, ROWS, COLUMNS)
    d = tl.arange(0, D)
    c = group * D + d
    total = _depthwise(x_ptr, taps_ptr, image, row, column, c, height, width, channels, K, False, ROWS * COLUMNS, D)
    # the depthwise result is rounded to x's type, as by a separate convolution; tf32 represents half precision exactly
    PRECISION: tl.constexpr = "tf32x3" if x_ptr.dtype.element_ty == tl.float32 else "tf32"
    total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
    matrix = tl.load(grouped_ptr + c[None, :] * D + d[:, None]).to(tl.float32)
    out = tl.dot(total, matrix, input_precision=PRECISION)
    offset = (image + row * width + column)[:, None] * channels + c[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask)


@Kernel
def _multiscale_qkv_grouped_backward_kernel(
    dout_ptr, x_ptr, taps_ptr, grouped_ptr, dconv_ptr, partial_ptr, height, width, channels, tiles, tiles_y, tiles_x,
    D: tl.constexpr, K: tl.constexpr, PARAMETERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the depthwise result, dconv. PARAMETERS: recomputes that result, and writes this split's
    sums of the gradient of grouped to partial [splits, channels, D].
    """
    groups = channels // D
    group, split, splits = tl.program_id(0) % groups, tl.program_id(0) // groups, tl.num_programs(0) // groups
    PRECISION: tl.constexpr = "tf32x3" if x_ptr.dtype.element_ty == tl.float32 else "tf32"
    d = tl.arange(0, D)
    c = group * D + d
    matrix = tl.load(grouped_ptr + c[:, None] * D + d[None, :]).to(tl.float32)
    dmatrix = tl.zeros((D, D), tl.float32)
    for tile in range(split, tiles, splits):
        image, row, column, mask = _tile(tile, height, width, tiles_y, tiles_x, ROWS, COLUMNS)
        offset = (image + row * width + column)[:, None] * channels + c[None, :]
        dout = tl.load(dout_ptr + offset, mask, 0.0).to(tl.float32)
        dconv = tl.dot(dout, matrix, input_precision=PRECISION)
        tl.store(dconv_ptr + offset, dconv.to(dconv_ptr.dtype.element_ty), mask)
        if PARAMETERS:
            conv = _depthwise(
                x_ptr, taps_ptr, image, row, column, c, height, width, channels, K, False, ROWS * COLUMNS, D
            )
            conv = conv.to(dconv_ptr.dtype.element_ty).to(tl.float32)
            dmatrix += tl.dot(tl.trans(dout), conv, input_precision=PRECISION)
    if PARAMETERS:
        tl.store(partial_ptr + (split * channels + c)[:, None] * D + d[None, :], dmatrix)


@Kernel
def _multiscale_qkv_input_backward_kernel(
    dconv_ptr, taps_ptr, dx_ptr, height, width, channels, tiles_y, tiles_x,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    groups = channels // D
    image, row, column, mask = _tile(tl.program_id(0) // groups, height, width, tiles_y, tiles_x, ROWS, COLUMNS)
    c = tl.program_id(0) % groups * D + tl.arange(0, D)
    dx = _depthwise(dconv_ptr, taps_ptr, image, row, column, c, height, width, channels, K, True, ROWS * COLUMNS, D)
    offset = (image + row * width + column)[:, None] * channels + c[None, :]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)


@Kernel
def _multiscale_qkv_taps_backward_kernel(
    dconv_ptr, x_ptr, partial_ptr, height, width, channels, tiles, tiles_y, tiles_x,
    D: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of a row of up to five taps over a split of the tiles, in partial [splits, K * K, channels]. The sums of
    each pixel of the tile stay apart until the end, so that threads exchange nothing in the loop.
    """
    groups = channels // D
    c = tl.program_id(0) % groups * D + tl.arange(0, D)
    i, split = tl.program_id(0) // groups % K, tl.program_id(0) // (groups * K)
    splits = tl.num_programs(0) // (groups * K)
    sum_0 = tl.zeros((ROWS * COLUMNS, D), tl.float32)
    sum_1, sum_2, sum_3, sum_4 = sum_0, sum_0, sum_0, sum_0
    for tile in range(split, tiles, splits):
        image, row, column, mask = _tile(tile, height, width, tiles_y, tiles_x, ROWS, COLUMNS)
        offset = (image + row * width + column)[:, None] * channels + c[None, :]
        dconv = tl.load(dconv_ptr + offset, mask, 0.0).to(tl.float32)
        row, column = row + i - K // 2, column - K // 2
        sum_0 += dconv * _pixels(x_ptr, image, row, column, c, height, width, channels)
        if K >= 3:
            sum_1 += dconv * _pixels(x_ptr, image, row, column + 1, c, height, width, channels)
            sum_2 += dconv * _pixels(x_ptr, image, row, column + 2, c, height, width, channels)
        if K >= 5:
            sum_3 += dconv * _pixels(x_ptr, image, row, column + 3, c, height, width, channels)
            sum_4 += dconv * _pixels(x_ptr, image, row, column + 4, c, height, width, channels)
    partial = partial_ptr + (split * K + i) * K * channels + c
    tl.store(partial, tl.sum(sum_0, 0))
    if K >= 3:
        tl.store(partial + channels, tl.sum(sum_1, 0))
        tl.store(partial + 2 * channels, tl.sum(sum_2, 0))
    if K >= 5:
        tl.store(partial + 3 * channels, tl.sum(sum_3, 0))
        tl.store(partial + 4 * channels, tl.sum(sum_4, 0))


def _tiles(x, tile):
    """Tiles along height, tiles along width, and the number of all tiles."""
    tiles_y, tiles_x = cdiv(x.shape[2], tile["ROWS"]), cdiv(x.shape[3], tile["COLUMNS"])
    return tiles_y, tiles_x, x.shape[0] * tiles_y * tiles_x


def _taps(depthwise):
    return depthwise.flatten(1).t().contiguous()


def launch_multiscale_qkv(x, depthwise, grouped):
    _, channels, height, width = x.shape
    tiles_y, tiles_x, tiles = _tiles(x, TILE)
    out = like_channels_last(x)
    if out.numel():
        dim = grouped.shape[1]
        _multiscale_qkv_kernel[(tiles * (channels // dim),)](
            x, _taps(depthwise), grouped, out, height, width, channels, tiles_y, tiles_x,
            D=dim, K=depthwise.shape[2], **TILE,
        )  # fmt: skip
    return out


def launch_multiscale_qkv_backward(dout, x, depthwise, grouped, parameters):
    """The gradients by x, depthwise and grouped. Without `parameters` the last two are empty."""
    _, channels, height, width = x.shape
    dim, size = grouped.shape[1], depthwise.shape[2]
    (tiles_y, tiles_x, tiles), groups = _tiles(x, BACKWARD_TILE), channels // dim
    taps, dconv, dx = _taps(depthwise), like_channels_last(x), like_channels_last(x)
    splits = persistent_splits(x, tiles, groups, PER_PROCESSOR) if x.numel() else 0
    sums = torch.empty(splits, channels, dim, dtype=torch.float32, device=x.device) if parameters else None
    if splits:
        _multiscale_qkv_grouped_backward_kernel[(splits * groups,)](
            dout, x, taps, grouped, dconv, sums, height, width, channels, tiles, tiles_y, tiles_x,
            D=dim, K=size, PARAMETERS=parameters, **BACKWARD_TILE, num_warps=dim // 8,
        )  # fmt: skip
        _multiscale_qkv_input_backward_kernel[(tiles * groups,)](
            dconv, taps, dx, height, width, channels, tiles_y, tiles_x, D=dim, K=size, **BACKWARD_TILE
        )
    if not parameters:
        return dx, x.new_empty(0), x.new_empty(0)
    splits = persistent_splits(x, tiles, groups * size, PER_PROCESSOR) if x.numel() else 0
    sums_of_taps = torch.empty(splits, size * size, channels, dtype=torch.float32, device=x.device)
    if splits:
        _multiscale_qkv_taps_backward_kernel[(splits * size * groups,)](
            dconv, x, sums_of_taps, height, width, channels, tiles, tiles_y, tiles_x,
            D=dim, K=size, **BACKWARD_TILE, num_warps=8,
        )  # fmt: skip
    ddepthwise = sums_of_taps.sum(0).t().contiguous().view(depthwise.shape).to(depthwise.dtype)
    return dx, ddepthwise, sums.sum(0).view(grouped.shape).to(grouped.dtype)
