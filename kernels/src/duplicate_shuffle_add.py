"""Repeats channels, moves them to space, and adds the main branch: [B, C, H, W] → [B, O, H * F, W * F].

A program loads whole channel vectors, splits them in registers into F × F pixels, and stores the pixels, so that every
access is coalesced. F is 1 or 2, the number of repeats a power of two.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, like_channels_last, next_power_of_2, promoted
from .launch import Kernel
from .quantize import to_int8

BLOCK_U, ELEMENTS = 1024, 4096  # of a program: channels before the shuffle; elements


@triton.jit
def _store_pixel(
    values, main_ptr, bias_ptr, out_ptr, quantized_ptr, factor_ptr, main_row, row, o, mask, out_channels,
    HAS_MAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Writes values + main + bias to rows of the output's matrix; main and bias if they have the output's channels."""
    offset = row[:, None] * out_channels + o[None, :]
    if HAS_MAIN:
        main = tl.load(main_ptr + main_row[:, None] * out_channels + o[None, :], mask, 0.0)
        values += main.to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias_ptr + o, o < out_channels, 0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offset, values.to(out_ptr.dtype.element_ty), mask)
    if quantized_ptr is not None:
        factor = tl.load(factor_ptr + o, o < out_channels, 0.0)
        tl.store(quantized_ptr + offset, to_int8(values, factor[None, :]), mask)


@Kernel
def _duplicate_shuffle_add_kernel(
    x_ptr, main_ptr, bias_ptr, out_ptr, quantized_ptr, factor_ptr,
    positions, width, in_channels, out_channels, blocks_u, scale,
    F: tl.constexpr, REPEATS: tl.constexpr, HAS_X: tl.constexpr, HAS_MAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHUFFLE_MAIN: tl.constexpr, PLANES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """positions, width: of the input. A program computes BLOCK_U of the F² · out_channels channels before the shuffle.

    PLANES: main holds the four parities of the output's pixels one after the other.
    """
    pid = tl.program_id(0)
    p = (pid // blocks_u).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = pid % blocks_u * BLOCK_U
    u = first + tl.arange(0, BLOCK_U)
    values = tl.zeros((BLOCK_P, BLOCK_U), tl.float32)
    if HAS_X:
        c = first // REPEATS + tl.arange(0, BLOCK_U // REPEATS)
        mask = (p < positions)[:, None] & (c < in_channels)[None, :]
        x = tl.load(x_ptr + p[:, None] * in_channels + c[None, :], mask, 0.0).to(tl.float32) * scale
        values = tl.reshape(tl.broadcast_to(x[:, :, None], (BLOCK_P, BLOCK_U // REPEATS, REPEATS)), (BLOCK_P, BLOCK_U))
    if SHUFFLE_MAIN:
        channels = out_channels * F * F
        mask = (p < positions)[:, None] & (u < channels)[None, :]
        values += tl.load(main_ptr + p[:, None] * channels + u[None, :], mask, 0.0).to(tl.float32)
        if HAS_BIAS:
            values += tl.load(bias_ptr + u, u < channels, 0.0).to(tl.float32)[None, :]
    ADD_MAIN: tl.constexpr = HAS_MAIN and not SHUFFLE_MAIN
    ADD_BIAS: tl.constexpr = HAS_BIAS and not SHUFFLE_MAIN
    o = first // (F * F) + tl.arange(0, BLOCK_U // (F * F))
    mask = (p < positions)[:, None] & (o < out_channels)[None, :]
    pixels, rows, main_rows = (values,), (p,), (p,)
    if F == 2:
        left, right = tl.split(tl.reshape(values, (BLOCK_P, BLOCK_U // 4, 2, 2)))
        x00, x10 = tl.split(left)
        x01, x11 = tl.split(right)
        row = (p // width) * 2 * (2 * width) + p % width * 2
        below = row + 2 * width
        pixels, rows = (x00, x01, x10, x11), (row, row + 1, below, below + 1)
        main_rows = rows
        if PLANES:
            planes = tl.cast(positions, tl.int64)
            main_rows = p, p + planes, p + 2 * planes, p + 3 * planes
    for i in tl.static_range(F * F):
        _store_pixel(
            pixels[i], main_ptr, bias_ptr, out_ptr, quantized_ptr, factor_ptr, main_rows[i], rows[i], o, mask,
            out_channels, ADD_MAIN, ADD_BIAS,
        )  # fmt: skip


def launch_duplicate_shuffle_add(x, main, bias, out_channels, factor, scale):
    return launch_duplicate_shuffle_add_int8(x, main, bias, out_channels, factor, scale, None)[0]


def launch_duplicate_shuffle_add_int8(x, main, bias, out_channels, factor, scale, out_factor):
    """The result, and the same as int8; None in its place if out_factor is None."""
    source = x if x is not None else main
    planes = main is not None and main.shape[0] != source.shape[0]
    shuffle_main = main is not None and factor > 1 and main.shape[2:] == source.shape[2:] and not planes
    batch, _, height, width = source.shape
    out = like_channels_last(source, (batch, out_channels, height * factor, width * factor), promoted(x, main))
    quantized = None if out_factor is None else like_channels_last(out, dtype=torch.int8)
    if out.numel():
        positions, channels = batch * height * width, out_channels * factor**2
        repeats = 1 if x is None else channels // x.shape[1]
        block_u = max(factor**2, repeats, min(BLOCK_U, next_power_of_2(channels)))
        block_p, blocks_u = max(1, ELEMENTS // block_u), cdiv(channels, block_u)
        _duplicate_shuffle_add_kernel[(cdiv(positions, block_p) * blocks_u,)](
            x, main, bias, out, quantized, out_factor,
            positions, width, 0 if x is None else x.shape[1], out_channels, blocks_u, scale,
            F=factor, REPEATS=repeats, HAS_X=x is not None, HAS_MAIN=main is not None, HAS_BIAS=bias is not None,
            SHUFFLE_MAIN=shuffle_main, PLANES=planes, BLOCK_P=block_p, BLOCK_U=block_u,
        )  # fmt: skip
    return out, quantized
