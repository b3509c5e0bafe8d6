"""Convolution of an image with few channels.

A row of the R × S window is S · C contiguous elements, both in the image and in the weight. The convolution therefore
consists of R products [positions, S · C] @ [S · C, filters], with a weight that stays on chip. Writing the result
limits the speed.
"""

import triton
import triton.language as tl

from .common import activate, cdiv, dot, fitting, like_channels_last, next_power_of_2, persistent_splits
from .launch import Kernel

# of a tile, if it fits: positions, filters in half and in single precision; warps; programs on a multiprocessor
POSITIONS, BLOCK_K, WARPS, PER_PROCESSOR = 64, {2: 128, 4: 32}, 4, 3


@triton.jit
def _weight_row(
    weight_ptr, k, t, filters, r: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    UNSHUFFLE: tl.constexpr,
):  # fmt: skip
    """[S · C, filters]: row r of the windows of filters k, elements t = (column, channel). weight: [filters, R, S, C].

    UNSHUFFLE: a convolution with (R - 1) × (S - 1) windows, then pixel-unshuffle by 2, is a convolution with R × S
    windows and stride 2. Its filter k is filter k // 4 of the original, moved to pixel k % 4 of the 2 × 2 pixels.
    """
    if UNSHUFFLE:
        row, column = r - k // 2 % 2, (t // C)[:, None] - (k % 2)[None, :]
        inside = ((row >= 0) & (row < R - 1))[None, :] & (column >= 0) & (column < S - 1)
        offset = ((k // 4 * (R - 1) + row) * (S - 1))[None, :] * C + column * C + (t % C)[:, None]
    else:
        inside = (t < S * C)[:, None]
        offset = ((k * R + r) * (S * C))[None, :] + t[:, None]
    return tl.load(weight_ptr + offset, inside & (k < filters)[None, :], 0.0)


@Kernel
def _conv2d_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, out_height, out_width, filters, top, left,
    tiles, tiles_h, tiles_w, blocks_k,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, UNSHUFFLE: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    t = tl.arange(0, BLOCK_T)
    weights = ()
    for r in tl.static_range(R):
        weights += (_weight_row(weight_ptr, k, t, filters, r, C, R, S, UNSHUFFLE),)
    bias = tl.zeros((BLOCK_K,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + (k // 4 if UNSHUFFLE else k), k < filters, 0.0).to(tl.float32)
    p = tl.arange(0, TILE_H * TILE_W)
    i, j = p // TILE_W, p % TILE_W
    for tile in range(tl.program_id(0) // blocks_k, tiles, tl.num_programs(0) // blocks_k):
        image = (tile // (tiles_w * tiles_h)).to(tl.int64)
        out_h, out_w = tile // tiles_w % tiles_h * TILE_H, tile % tiles_w * TILE_W
        first_h, first_w = out_h * STRIDE - top, out_w * STRIDE - left
        element = (first_w + j * STRIDE)[:, None] * C + t[None, :]  # in a row of the image
        in_row = (element >= 0) & (element < width * C) & (t < S * C)[None, :]
        rows = ()
        for r in tl.static_range(R):  # start all loads before the first wait
            h = first_h + r + i * STRIDE
            row = x_ptr + (image * height + first_h + r) * (width * C)
            inside = in_row & ((h >= 0) & (h < height))[:, None]
            rows += (tl.load(row + (i * (STRIDE * C) * width)[:, None] + element, inside, 0.0),)
        y = tl.zeros((TILE_H * TILE_W, BLOCK_K), tl.float32)
        for r in tl.static_range(R):
            y = dot(rows[r], weights[r], y)
        out = out_ptr + ((image * out_height + out_h) * out_width + out_w) * filters
        offset = ((i * out_width + j) * filters)[:, None] + k[None, :]
        mask = ((out_h + i < out_height) & (out_w + j < out_width))[:, None] & (k < filters)[None, :]
        tl.store(out + offset, activate(y + bias[None, :], ACT).to(out_ptr.dtype.element_ty), mask)


def _sides(x, block_k, rows, block_t):
    """Positions and filters of a tile. On chip are all rows of the window, the rows of x twice, and the result."""
    itemsize = x.element_size()

    def needed(size, p, k):
        return rows * block_t * (2 * itemsize * p + size * k) + 4 * p * max(k, block_t)

    return fitting(x, itemsize, (POSITIONS, block_k), needed)


def _launch(x, weight, bias, act, size, filters, window, stride, top, left, unshuffle):
    """size: (height, width) of the result; window: (rows, columns)."""
    out = like_channels_last(x, (x.shape[0], filters, *size))
    if out.numel():
        block_t = max(16, next_power_of_2(window[1] * x.shape[1]))
        block_k = max(16, min(BLOCK_K[x.element_size()], next_power_of_2(filters)))
        positions, block_k = _sides(x, block_k, window[0], block_t)
        tile_w = min(positions, next_power_of_2(size[1]))
        tile_h = positions // tile_w
        tiles_h, tiles_w = cdiv(size[0], tile_h), cdiv(size[1], tile_w)
        tiles, blocks_k = x.shape[0] * tiles_h * tiles_w, cdiv(filters, block_k)
        splits = persistent_splits(x, tiles, blocks_k, PER_PROCESSOR)
        _conv2d_kernel[(splits * blocks_k,)](
            x, weight, bias, out, *x.shape[2:], *size, filters, top, left, tiles, tiles_h, tiles_w, blocks_k,
            C=x.shape[1], R=window[0], S=window[1], STRIDE=stride, UNSHUFFLE=unshuffle, ACT=act,
            HAS_BIAS=bias is not None, TILE_H=tile_h, TILE_W=tile_w, BLOCK_T=block_t, BLOCK_K=block_k,
            num_warps=WARPS,
        )  # fmt: skip
    return out


def launch_conv2d(x, weight, bias, act, stride, padding):
    """act(conv(x, weight) + bias); padding: (top, left, bottom, right)."""
    filters, _, *window = weight.shape
    top, left, bottom, right = padding
    size = [
        (side + before + after - taps) // stride + 1
        for side, before, after, taps in zip(x.shape[2:], (top, left), (bottom, right), window, strict=True)
    ]
    return _launch(x, weight, bias, act, size, filters, window, stride, top, left, False)


def launch_conv2d_unshuffle(x, weight, bias):
    """pixel_unshuffle(conv(x, weight) + bias, 2), weight: [K, C, 3, 3], padding 1."""
    size = [side // 2 for side in x.shape[2:]]
    return _launch(x, weight, bias, "none", size, 4 * weight.shape[0], (4, 4), 2, 1, 1, True)
