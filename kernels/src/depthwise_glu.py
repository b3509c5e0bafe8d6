"""3×3 depthwise convolution, bias and SiLU gate in one pass over a channels-last tensor.

In the forward pass a program walks down a strip of the image. In the backward pass it computes TILE_H × TILE_W
positions of BLOCK_C channels from nine shifted tiles, which overlap in the L1 cache.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, like_channels_last, persistent_splits, sigmoid
from .launch import Kernel
from .quantize import to_int8

STRIP = {"BLOCK_W": 8, "BLOCK_C": 64}  # forward
TILE = {"TILE_H": 4, "TILE_W": 8, "BLOCK_C": 64}  # backward


@triton.jit
def _tile(tile, height, width, tiles_h, tiles_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image, rows and columns of the positions of a tile."""
    p = tl.arange(0, TILE_H * TILE_W)
    h = (tile // tiles_w) % tiles_h * TILE_H + p // TILE_W
    w = tile % tiles_w * TILE_W + p % TILE_W
    return (tile // (tiles_w * tiles_h)).to(tl.int64), h, w


@triton.jit
def _shifted(x_ptr, image, h, w, c, c_mask, height, width, channels):
    """Channels c of x at (h, w), zero outside of the image."""
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    offset = ((image * height + h) * width + w)[:, None] * channels + c[None, :]
    return tl.load(x_ptr + offset, inside[:, None] & c_mask[None, :], 0.0).to(tl.float32)


@triton.jit
def _depthwise(
    x_ptr, taps_ptr, image, h, w, c, c_mask, height, width, channels,
    FLIP: tl.constexpr, POSITIONS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum over the nine taps, in fp32. taps: [9, channels]. FLIP: transposed convolution."""
    acc = tl.zeros((POSITIONS, BLOCK_C), tl.float32)
    for tap in tl.static_range(9):
        weight = tl.load(taps_ptr + (8 - tap if FLIP else tap) * channels + c, c_mask, 0.0).to(tl.float32)
        x = _shifted(x_ptr, image, h + tap // 3 - 1, w + tap % 3 - 1, c, c_mask, height, width, channels)
        acc += x * weight[None, :]
    return acc


@triton.jit
def _value_and_gate(
    x_ptr, taps_ptr, bias_ptr, image, h, w, c, c_mask, height, width, half,
    POSITIONS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    value = _depthwise(x_ptr, taps_ptr, image, h, w, c, c_mask, height, width, 2 * half, False, POSITIONS, BLOCK_C)
    gate = _depthwise(
        x_ptr, taps_ptr, image, h, w, c + half, c_mask, height, width, 2 * half, False, POSITIONS, BLOCK_C
    )
    value += tl.load(bias_ptr + c, c_mask, 0.0).to(tl.float32)[None, :]
    gate += tl.load(bias_ptr + half + c, c_mask, 0.0).to(tl.float32)[None, :]
    return value, gate


@triton.jit
def _row(x_ptr, image, h, w, c, c_mask, height, width, channels):
    """Channels c of row h at columns w - 1, w and w + 1."""
    left = _shifted(x_ptr, image, h, w - 1, c, c_mask, height, width, channels)
    middle = _shifted(x_ptr, image, h, w, c, c_mask, height, width, channels)
    right = _shifted(x_ptr, image, h, w + 1, c, c_mask, height, width, channels)
    return left, middle, right


@triton.jit
def _taps_row(taps_ptr, row: tl.constexpr, c, c_mask, channels):
    """The three weights of a row, for each channel."""
    taps = taps_ptr + 3 * row * channels + c
    left = tl.load(taps, c_mask, 0.0).to(tl.float32)[None, :]
    middle = tl.load(taps + channels, c_mask, 0.0).to(tl.float32)[None, :]
    right = tl.load(taps + 2 * channels, c_mask, 0.0).to(tl.float32)[None, :]
    return left, middle, right


@Kernel
def _depthwise_glu_forward_kernel(
    x_ptr, taps_ptr, bias_ptr, out_ptr, factor_ptr, height, width, half, strips, blocks_w, blocks_c, rows,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program walks down `rows` rows. Partial sums of the output rows above and level with the next input row stay in
    registers, so that every input row is read once, at three shifts.
    """
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    w = pid // blocks_c % blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    first = pid // (blocks_c * blocks_w) % strips * rows
    image = (pid // (blocks_c * blocks_w * strips)).to(tl.int64)
    c_mask = c < half
    mask = (w < width)[:, None] & c_mask[None, :]
    a00, a01, a02 = _taps_row(taps_ptr, 0, c, c_mask, 2 * half)
    a10, a11, a12 = _taps_row(taps_ptr, 1, c, c_mask, 2 * half)
    a20, a21, a22 = _taps_row(taps_ptr, 2, c, c_mask, 2 * half)
    b00, b01, b02 = _taps_row(taps_ptr, 0, c + half, c_mask, 2 * half)
    b10, b11, b12 = _taps_row(taps_ptr, 1, c + half, c_mask, 2 * half)
    b20, b21, b22 = _taps_row(taps_ptr, 2, c + half, c_mask, 2 * half)
    value_bias = tl.load(bias_ptr + c, c_mask, 0.0).to(tl.float32)[None, :]
    gate_bias = tl.load(bias_ptr + half + c, c_mask, 0.0).to(tl.float32)[None, :]
    value_above = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    value_level, gate_above, gate_level = value_above, value_above, value_above
    for h in range(first - 1, tl.minimum(first + rows, height) + 1):
        left, middle, right = _row(x_ptr, image, h, w, c, c_mask, height, width, 2 * half)
        value = value_above + left * a20 + middle * a21 + right * a22
        value_above = value_level + left * a10 + middle * a11 + right * a12
        value_level = value_bias + left * a00 + middle * a01 + right * a02
        left, middle, right = _row(x_ptr, image, h, w, c + half, c_mask, height, width, 2 * half)
        gate = gate_above + left * b20 + middle * b21 + right * b22
        gate_above = gate_level + left * b10 + middle * b11 + right * b12
        gate_level = gate_bias + left * b00 + middle * b01 + right * b02
        if h > first:  # the row above is complete
            offset = ((image * height + h - 1) * width + w)[:, None] * half + c[None, :]
            y = value * gate * sigmoid(gate)
            if factor_ptr is not None:
                tl.store(out_ptr + offset, to_int8(y, tl.load(factor_ptr + c, c_mask, 0.0)[None, :]), mask)
            else:
                tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask)


@Kernel
def _depthwise_glu_gate_backward_kernel(
    dout_ptr, x_ptr, taps_ptr, bias_ptr, dconv_ptr, height, width, half, tiles_h, tiles_w, blocks_c,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Recomputes the convolution; writes the gradient of its result, dconv [B, 2 * half, H, W]."""
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < half
    image, h, w = _tile(pid // blocks_c, height, width, tiles_h, tiles_w, TILE_H, TILE_W)
    value, gate = _value_and_gate(
        x_ptr, taps_ptr, bias_ptr, image, h, w, c, c_mask, height, width, half, TILE_H * TILE_W, BLOCK_C
    )
    position = ((image * height + h) * width + w)[:, None]
    mask = ((h < height) & (w < width))[:, None] & c_mask[None, :]
    dout = tl.load(dout_ptr + position * half + c[None, :], mask, 0.0).to(tl.float32)
    s = sigmoid(gate)
    dvalue = dout * gate * s
    dgate = dout * value * s * (1.0 + gate * (1.0 - s))
    dconv = dconv_ptr + position * (2 * half) + c[None, :]
    tl.store(dconv, dvalue.to(dconv_ptr.dtype.element_ty), mask)
    tl.store(dconv + half, dgate.to(dconv_ptr.dtype.element_ty), mask)


@Kernel
def _depthwise_glu_input_backward_kernel(
    dconv_ptr, taps_ptr, dx_ptr, height, width, channels, tiles_h, tiles_w, blocks_c,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    image, h, w = _tile(pid // blocks_c, height, width, tiles_h, tiles_w, TILE_H, TILE_W)
    dx = _depthwise(
        dconv_ptr, taps_ptr, image, h, w, c, c_mask, height, width, channels, True, TILE_H * TILE_W, BLOCK_C
    )
    offset = ((image * height + h) * width + w)[:, None] * channels + c[None, :]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), ((h < height) & (w < width))[:, None] & c_mask[None, :])


@Kernel
def _depthwise_glu_weight_backward_kernel(
    dconv_ptr, x_ptr, partial_ptr, height, width, channels, tiles, tiles_h, tiles_w, blocks_c, splits,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a split of the tiles, of the nine taps, then of the bias, in partial [splits, 10, channels]."""
    split = tl.program_id(0) // blocks_c
    c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    row = tl.arange(0, 16)[:, None]  # ten sums, then six rows of zeros, since sizes are powers of two
    totals = tl.zeros((16, BLOCK_C), tl.float32)
    for tile in range(split, tiles, splits):
        image, h, w = _tile(tile, height, width, tiles_h, tiles_w, TILE_H, TILE_W)
        dconv = _shifted(dconv_ptr, image, h, w, c, c_mask, height, width, channels)
        totals += tl.where(row == 9, tl.sum(dconv, 0)[None, :], 0.0)
        for tap in tl.static_range(9):
            x = _shifted(x_ptr, image, h + tap // 3 - 1, w + tap % 3 - 1, c, c_mask, height, width, channels)
            totals += tl.where(row == tap, tl.sum(dconv * x, 0)[None, :], 0.0)
    tl.store(partial_ptr + (split * 10 + row) * channels + c[None, :], totals, (row < 10) & c_mask[None, :])


def _sizes(x, channels):
    """Tiles along height, tiles along width, blocks of channels, and the total number of tiles."""
    tiles_h, tiles_w = cdiv(x.shape[2], TILE["TILE_H"]), cdiv(x.shape[3], TILE["TILE_W"])
    return tiles_h, tiles_w, cdiv(channels, TILE["BLOCK_C"]), x.shape[0] * tiles_h * tiles_w


def _taps(weight):
    return weight.reshape(-1, 9).t().contiguous()


def launch_depthwise_glu(x, weight, bias):
    return launch_depthwise_glu_int8(x, weight, bias, None)


def launch_depthwise_glu_int8(x, weight, bias, out_factor):
    """The result in the type of x if out_factor is None."""
    batch, channels, height, width = x.shape
    half = channels // 2
    out = like_channels_last(x, (batch, half, height, width), None if out_factor is None else torch.int8)
    if out.numel():
        blocks_w, blocks_c = cdiv(width, STRIP["BLOCK_W"]), cdiv(half, STRIP["BLOCK_C"])
        strips = persistent_splits(x, cdiv(height, 8), batch * blocks_w * blocks_c)
        _depthwise_glu_forward_kernel[(batch * strips * blocks_w * blocks_c,)](
            x, _taps(weight), bias, out, out_factor, height, width, half, strips, blocks_w, blocks_c,
            cdiv(height, strips), **STRIP, num_warps=4,
        )  # fmt: skip
    return out


def launch_depthwise_glu_backward(dout, x, weight, bias, parameters):
    """The gradients by x, weight and bias. Without `parameters` the last two are empty."""
    _, channels, height, width = x.shape
    taps, dconv, dx = _taps(weight), like_channels_last(x), like_channels_last(x)
    tiles_h, tiles_w, blocks_c, tiles = _sizes(x, channels // 2)
    splits = 0
    if x.numel():
        _depthwise_glu_gate_backward_kernel[(tiles * blocks_c,)](
            dout, x, taps, bias, dconv, height, width, channels // 2, tiles_h, tiles_w, blocks_c, **TILE, num_warps=8
        )
        blocks_c = cdiv(channels, TILE["BLOCK_C"])
        _depthwise_glu_input_backward_kernel[(tiles * blocks_c,)](
            dconv, taps, dx, height, width, channels, tiles_h, tiles_w, blocks_c, **TILE
        )
        splits = persistent_splits(x, tiles, blocks_c)
    if not parameters:
        return dx, x.new_empty(0), x.new_empty(0)
    partial = torch.empty(splits, 10, channels, dtype=torch.float32, device=x.device)
    if splits:
        _depthwise_glu_weight_backward_kernel[(splits * blocks_c,)](
            dconv, x, partial, height, width, channels, tiles, tiles_h, tiles_w, blocks_c, splits, **TILE, num_warps=8
        )
    dweight, dbias = partial[:, :9].sum(0).t().contiguous(), partial[:, 9].sum(0)
    return dx, dweight.view(weight.shape).to(weight.dtype), dbias.to(bias.dtype)
