"""Converts a convolution's weight [K, C, R, S] from contiguous to channels-last."""

import triton.language as tl

from .common import cdiv, like_channels_last, next_power_of_2
from .launch import Kernel


@Kernel
def _weight_layout_kernel(
    weight_ptr, out_ptr, channels, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    blocks = tl.cdiv(channels, BLOCK_C)
    filter_start = (tl.program_id(0) // blocks).to(tl.int64) * channels * TAPS
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    mask = (c < channels)[:, None] & (t < TAPS)[None, :]
    values = tl.load(weight_ptr + filter_start + c[:, None] * TAPS + t[None, :], mask)
    tl.store(out_ptr + filter_start + t[:, None] * channels + c[None, :], tl.trans(values), tl.trans(mask))


def launch_weight_layout(weight):
    out = like_channels_last(weight)
    if out.numel():
        filters, channels, taps = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
        block = min(256, next_power_of_2(channels))
        _weight_layout_kernel[(filters * cdiv(channels, block),)](
            weight, out, channels, TAPS=taps, BLOCK_T=next_power_of_2(taps), BLOCK_C=block
        )
    return out
