"""Rounds the weight of a convolution, and turns it into the weight of the convolution that computes its gradient."""

import triton.language as tl

from .common import cdiv, like_channels_last
from .launch import Kernel

SIDE = 64  # of a tile: filters and channels


@Kernel
def _flip_weight_kernel(
    weight_ptr, rounded_ptr, flipped_ptr, filters, channels,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, HAS_ROUNDED: tl.constexpr,
):  # fmt: skip
    """A program computes a tile of filters and channels of one tap. All weights are channels-last: [K, taps, C]."""
    blocks_c, tap = tl.cdiv(channels, BLOCK), tl.program_id(0) % TAPS
    k = tl.program_id(0) // TAPS // blocks_c * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(0) // TAPS % blocks_c * BLOCK + tl.arange(0, BLOCK)
    mask = (k < filters)[:, None] & (c < channels)[None, :]
    offset = (k.to(tl.int64)[:, None] * TAPS + tap) * channels + c[None, :]
    weight = tl.load(weight_ptr + offset, mask, 0.0).to(flipped_ptr.dtype.element_ty)
    if HAS_ROUNDED:
        tl.store(rounded_ptr + offset, weight, mask)
    offset = (c.to(tl.int64)[:, None] * TAPS + (TAPS - 1 - tap)) * filters + k[None, :]
    tl.store(flipped_ptr + offset, tl.trans(weight), tl.trans(mask))


def launch_flip_weight(weight, dtype):
    """(rounded, flipped) in this dtype; `rounded` is empty if the weight has it already."""
    filters, channels, height, width = weight.shape
    rounded = weight.new_empty(0, dtype=dtype) if weight.dtype == dtype else like_channels_last(weight, dtype=dtype)
    flipped = like_channels_last(weight, (channels, filters, height, width), dtype)
    if weight.numel():
        tiles = cdiv(filters, SIDE) * cdiv(channels, SIDE)
        _flip_weight_kernel[(tiles * height * width,)](
            weight, rounded, flipped, filters, channels,
            TAPS=height * width, BLOCK=SIDE, HAS_ROUNDED=weight.dtype != dtype,
        )  # fmt: skip
    return rounded, flipped
