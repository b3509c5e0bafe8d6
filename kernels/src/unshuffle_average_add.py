"""Space to channel with group averaging, plus the main branch: [B, C, H, W] → [B, O, H / F, W / F]."""

import triton
import triton.language as tl

from .common import like_channels_last, promoted

BLOCK_P, BLOCK_C = 16, 128


@triton.jit
def _unshuffled(ptr, image, h, w, u, out_height, out_width, channels, F: tl.constexpr, mask):
    """Channel u of pixel_unshuffle(x, F) at (h, w), where x has `channels` channels."""
    row = (image * out_height * F + h * F)[:, None] + (u % (F * F) // F)[None, :]
    column = (w * F)[:, None] + (u % F)[None, :]
    offset = (row * (out_width * F) + column) * channels + (u // (F * F))[None, :]
    return tl.load(ptr + offset, mask, 0.0).to(tl.float32)


@triton.jit
def _unshuffle_average_add_kernel(
    x_ptr, main_ptr, bias_ptr, out_ptr, positions, height, width, in_channels, out_channels, blocks_c, scale,
    F: tl.constexpr, GROUP: tl.constexpr, HAS_X: tl.constexpr, HAS_MAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    UNSHUFFLE_MAIN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """height, width: of the output. GROUP: averaged channels. Main is at the output's resolution or is unshuffled."""
    pid = tl.program_id(0)
    p = (pid // blocks_c).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < positions)[:, None] & (o < out_channels)[None, :]
    image, h, w = p // (height * width), p // width % height, p % width
    out = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if HAS_X:
        for g in range(GROUP):
            out += _unshuffled(x_ptr, image, h, w, o * GROUP + g, height, width, in_channels, F, mask)
        out *= scale
    offset = p[:, None] * out_channels + o[None, :]
    if HAS_MAIN:
        if UNSHUFFLE_MAIN:
            out += _unshuffled(main_ptr, image, h, w, o, height, width, out_channels // (F * F), F, mask)
        else:
            out += tl.load(main_ptr + offset, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        bias_channel = o // (F * F) if UNSHUFFLE_MAIN else o
        out += tl.load(bias_ptr + bias_channel, o < out_channels, 0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask)


def launch_unshuffle_average_add(x, main, bias, out_channels, factor, scale):
    source = x if x is not None else main
    unshuffle_main = main is not None and factor > 1 and main.shape[2:] == source.shape[2:]
    height, width = source.shape[2] // factor, source.shape[3] // factor
    out = like_channels_last(source, (source.shape[0], out_channels, height, width), promoted(x, main))
    if out.numel():
        positions, blocks_c = source.shape[0] * height * width, triton.cdiv(out_channels, BLOCK_C)
        in_channels = x.shape[1] if x is not None else 0
        _unshuffle_average_add_kernel[(triton.cdiv(positions, BLOCK_P) * blocks_c,)](
            x, main, bias, out, positions, height, width, in_channels, out_channels, blocks_c, scale,
            F=factor, GROUP=in_channels * factor**2 // out_channels, HAS_X=x is not None, HAS_MAIN=main is not None,
            HAS_BIAS=bias is not None, UNSHUFFLE_MAIN=unshuffle_main, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C,
        )  # fmt: skip
    return out
