"""Weights of the four 2×2 convolutions that equal nearest-neighbour 2× up-sampling, then a 3×3 convolution."""

import torch
import triton
import triton.language as tl

from .launch import Kernel


@Kernel
def _subpixel_weights_kernel(
    weight_ptr, out_ptr, filters, channels, stride_k, stride_c, stride_tap, BLOCK: tl.constexpr
):
    """out: [2, 2, filters, 2, 2, channels], for each parity the sums of the taps that fall on the same pixel."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < filters * channels
    k, c = index // channels, index % channels
    source = weight_ptr + k * stride_k + c * stride_c
    for parity in tl.static_range(4):
        for tap in tl.static_range(4):
            # along one axis, parity 0 sees taps (0, 1 + 2) and parity 1 sees taps (0 + 1, 2)
            total = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(3):
                for j in tl.static_range(3):
                    if (i + 1 - parity // 2) // 2 == tap // 2 and (j + 1 - parity % 2) // 2 == tap % 2:
                        total += tl.load(source + (3 * i + j) * stride_tap, mask, 0.0).to(tl.float32)
            target = out_ptr + ((parity * filters + k) * 4 + tap) * channels + c
            tl.store(target, total.to(out_ptr.dtype.element_ty), mask)


def launch_subpixel_weights(weight):
    """[K, C, 3, 3] → [4, K, C, 2, 2]: a channels-last weight for each output parity, 00, 01, 10 and 11."""
    filters, channels = weight.shape[:2]
    out = torch.empty(4, filters, 2, 2, channels, dtype=weight.dtype, device=weight.device)
    stride_k, stride_c, stride_row, stride_column = weight.stride()
    assert stride_row == 3 * stride_column
    block = 512
    _subpixel_weights_kernel[(triton.cdiv(filters * channels, block),)](
        weight, out, filters, channels, stride_k, stride_c, stride_column, BLOCK=block
    )
    return out.permute(0, 1, 4, 2, 3)
