"""Channels repeated in place and moved to space, plus the main branch: [B, C, H, W] → [B, O, H * F, W * F]."""

import triton
import triton.language as tl

from .common import like_channels_last, promoted

BLOCK_P, BLOCK_C = 16, 128


@triton.jit
def _duplicate_shuffle_add_kernel(
    x_ptr, main_ptr, bias_ptr, out_ptr, positions, width, in_channels, out_channels, blocks_c, scale,
    F: tl.constexpr, REPEATS: tl.constexpr, HAS_X: tl.constexpr, HAS_MAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHUFFLE_MAIN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """positions, width: of the input; a program writes the F × F pixels of each. Shuffled, main has O * F² channels."""
    pid = tl.program_id(0)
    p = (pid // blocks_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < positions)[:, None] & (o < out_channels)[None, :]
    for pixel in tl.static_range(F * F):
        u = o * (F * F) + pixel
        out_row = (p // width * F + pixel // F) * (width * F) + p % width * F + pixel % F
        offset = out_row[:, None] * out_channels + o[None, :]
        out = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        if HAS_X:
            out += tl.load(x_ptr + p[:, None] * in_channels + (u // REPEATS)[None, :], mask, 0.0).to(tl.float32)
            out *= scale
        if HAS_MAIN:
            if SHUFFLE_MAIN:
                main = tl.load(main_ptr + p[:, None] * (out_channels * F * F) + u[None, :], mask, 0.0)
            else:
                main = tl.load(main_ptr + offset, mask, 0.0)
            out += main.to(tl.float32)
        if HAS_BIAS:
            bias_channel = u if SHUFFLE_MAIN else o
            out += tl.load(bias_ptr + bias_channel, o < out_channels, 0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask)


def launch_duplicate_shuffle_add(x, main, bias, out_channels, factor, scale):
    source = x if x is not None else main
    shuffle_main = main is not None and factor > 1 and main.shape[2:] == source.shape[2:]
    batch, _, height, width = source.shape
    out = like_channels_last(source, (batch, out_channels, height * factor, width * factor), promoted(x, main))
    if out.numel():
        positions, blocks_c = batch * height * width, triton.cdiv(out_channels, BLOCK_C)
        in_channels = x.shape[1] if x is not None else out_channels * factor**2
        _duplicate_shuffle_add_kernel[(triton.cdiv(positions, BLOCK_P) * blocks_c,)](
            x, main, bias, out, positions, width, in_channels, out_channels, blocks_c, scale,
            F=factor, REPEATS=out_channels * factor**2 // in_channels, HAS_X=x is not None,
            HAS_MAIN=main is not None, HAS_BIAS=bias is not None, SHUFFLE_MAIN=shuffle_main,
            BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C,
        )  # fmt: skip
    return out
