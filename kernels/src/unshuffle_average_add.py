"""Moves space to channels, averages groups of channels, and adds the main branch: [B, C, H, W] → [B, O, H / F, W / F].

A program loads whole channel vectors of the F × F pixels and interleaves them in registers, so that every access is
coalesced. F is 1 or 2, the size of a group a power of two.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, like_channels_last, next_power_of_2, promoted
from .launch import Kernel
from .quantize import to_int8

BLOCK_O, ELEMENTS = 256, 4096  # of a program: output channels; elements of the largest operand


@triton.jit
def _unshuffled(
    ptr, p, height, width, first, channels, positions,
    F: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels F² · first ... F² · (first + BLOCK_C) - 1 of pixel_unshuffle at positions p: [P, F² · BLOCK_C]."""
    c = first + tl.arange(0, BLOCK_C)
    mask = (p < positions)[:, None] & (c < channels)[None, :]
    if F == 1:
        return tl.load(ptr + p[:, None] * channels + c[None, :], mask, 0.0).to(tl.float32)
    else:
        row = (p // width) * 2 * (2 * width) + p % width * 2  # of the first of the F × F pixels, in the input
        pixel = ptr + row[:, None] * channels + c[None, :]
        below = 2 * width * channels
        x00 = tl.load(pixel, mask, 0.0).to(tl.float32)
        x01 = tl.load(pixel + channels, mask, 0.0).to(tl.float32)
        x10 = tl.load(pixel + below, mask, 0.0).to(tl.float32)
        x11 = tl.load(pixel + below + channels, mask, 0.0).to(tl.float32)
        return tl.interleave(tl.interleave(x00, x10), tl.interleave(x01, x11))


@Kernel
def _unshuffle_average_add_kernel(
    x_ptr, main_ptr, bias_ptr, out_ptr, quantized_ptr, factor_ptr,
    positions, height, width, in_channels, out_channels, blocks_o, scale,
    F: tl.constexpr, GROUP: tl.constexpr, HAS_X: tl.constexpr, HAS_MAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    UNSHUFFLE_MAIN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """height, width: of the output. GROUP: number of averaged channels. UNSHUFFLE_MAIN: main has x's resolution."""
    pid = tl.program_id(0)
    p = (pid // blocks_o).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    first = pid % blocks_o * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    mask = (p < positions)[:, None] & (o < out_channels)[None, :]
    offset = p[:, None] * out_channels + o[None, :]
    out = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    if HAS_X:
        first_x = first * GROUP // (F * F)
        x = _unshuffled(
            x_ptr, p, height, width, first_x, in_channels, positions, F, BLOCK_P, BLOCK_O * GROUP // (F * F)
        )
        out = tl.sum(tl.reshape(x, (BLOCK_P, BLOCK_O, GROUP)), 2) * scale
    if HAS_MAIN:
        if UNSHUFFLE_MAIN:
            main_channels = out_channels // (F * F)
            out += _unshuffled(
                main_ptr, p, height, width, first // (F * F), main_channels, positions, F, BLOCK_P, BLOCK_O // (F * F)
            )
        else:
            out += tl.load(main_ptr + offset, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        bias_channel = o // (F * F) if UNSHUFFLE_MAIN else o
        out += tl.load(bias_ptr + bias_channel, o < out_channels, 0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask)
    if quantized_ptr is not None:
        factor = tl.load(factor_ptr + o, o < out_channels, 0.0)
        tl.store(quantized_ptr + offset, to_int8(out, factor[None, :]), mask)


def launch_unshuffle_average_add(x, main, bias, out_channels, factor, scale):
    return launch_unshuffle_average_add_int8(x, main, bias, out_channels, factor, scale, None)[0]


def launch_unshuffle_average_add_int8(x, main, bias, out_channels, factor, scale, out_factor):
    """The result, and the same as int8; None in its place if out_factor is None."""
    source = x if x is not None else main
    unshuffle_main = main is not None and factor > 1 and main.shape[2:] == source.shape[2:]
    height, width = source.shape[2] // factor, source.shape[3] // factor
    out = like_channels_last(source, (source.shape[0], out_channels, height, width), promoted(x, main))
    quantized = None if out_factor is None else like_channels_last(out, dtype=torch.int8)
    if out.numel():
        positions = source.shape[0] * height * width
        in_channels = x.shape[1] if x is not None else 0
        group = max(1, in_channels * factor**2 // out_channels)
        block_o = max(factor**2, min(BLOCK_O, next_power_of_2(out_channels), ELEMENTS // group))
        block_p, blocks_o = max(1, ELEMENTS // (block_o * group)), cdiv(out_channels, block_o)
        _unshuffle_average_add_kernel[(cdiv(positions, block_p) * blocks_o,)](
            x, main, bias, out, quantized, out_factor,
            positions, height, width, in_channels, out_channels, blocks_o, scale,
            F=factor, GROUP=group, HAS_X=x is not None, HAS_MAIN=main is not None, HAS_BIAS=bias is not None,
            UNSHUFFLE_MAIN=unshuffle_main, BLOCK_P=block_p, BLOCK_O=block_o,
        )  # fmt: skip
    return out, quantized
