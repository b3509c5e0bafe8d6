"""Weights of convolutions that equal nearest-neighbour 2× up-sampling, then a 3×3 convolution.

Either of four 2×2 convolutions, or of one transposed 4×4 convolution with stride 2.
"""

import triton
import triton.language as tl

from .common import cdiv, like_channels_last
from .launch import Kernel

TILE = {"BLOCK_K": 32, "BLOCK_C": 32}  # of the transposed weights


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


def launch_subpixel_weights(weight, dtype):
    """[K, C, 3, 3] → [4 K, C, 2, 2]: channels-last weights for the output parities 00, 01, 10 and 11."""
    filters, channels = weight.shape[:2]
    out = like_channels_last(weight, (4 * filters, channels, 2, 2), dtype)
    stride_k, stride_c, stride_row, stride_column = weight.stride()
    assert stride_row == 3 * stride_column
    block = 512
    _subpixel_weights_kernel[(cdiv(filters * channels, block),)](
        weight, out, filters, channels, stride_k, stride_c, stride_column, BLOCK=block
    )
    return out


@triton.jit
def _taps(weight_ptr, row, channels, offset, mask):
    """One row of a 3×3 kernel as the four taps of a row of the transposed kernel."""
    w0 = tl.load(weight_ptr + (3 * row) * channels + offset, mask, 0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + (3 * row + 1) * channels + offset, mask, 0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + (3 * row + 2) * channels + offset, mask, 0.0).to(tl.float32)
    return w2, w1 + w2, w0 + w1, w0


@triton.jit
def _store_column(out_ptr, w0, w1, w2, filters, offset, mask):
    """One column of the transposed kernel from that column of three rows."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + offset, tl.trans(w2).to(dtype), mask)
    tl.store(out_ptr + 4 * filters + offset, tl.trans(w1 + w2).to(dtype), mask)
    tl.store(out_ptr + 8 * filters + offset, tl.trans(w0 + w1).to(dtype), mask)
    tl.store(out_ptr + 12 * filters + offset, tl.trans(w0).to(dtype), mask)


@Kernel
def _transposed_weights_kernel(weight_ptr, out_ptr, filters, channels, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """weight: [filters, 3, 3, channels]; out: [channels, 4, 4, filters]."""
    blocks = tl.cdiv(channels, BLOCK_C)
    k = tl.program_id(0) // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    source = k[:, None].to(tl.int64) * 9 * channels + c[None, :]
    target = c[:, None].to(tl.int64) * 16 * filters + k[None, :]
    mask, target_mask = (
        (k < filters)[:, None] & (c < channels)[None, :],
        (c < channels)[:, None] & (k < filters)[None, :],
    )
    a0, a1, a2, a3 = _taps(weight_ptr, 0, channels, source, mask)
    b0, b1, b2, b3 = _taps(weight_ptr, 1, channels, source, mask)
    c0, c1, c2, c3 = _taps(weight_ptr, 2, channels, source, mask)
    _store_column(out_ptr, a0, b0, c0, filters, target, target_mask)
    _store_column(out_ptr + filters, a1, b1, c1, filters, target, target_mask)
    _store_column(out_ptr + 2 * filters, a2, b2, c2, filters, target, target_mask)
    _store_column(out_ptr + 3 * filters, a3, b3, c3, filters, target, target_mask)


@triton.jit
def _sums(dout_ptr, row, filters, offset, mask):
    """One row of the gradient of a transposed kernel, summed to the three taps of a row of the 3×3 kernel."""
    d0 = tl.load(dout_ptr + (4 * row) * filters + offset, mask, 0.0).to(tl.float32)
    d1 = tl.load(dout_ptr + (4 * row + 1) * filters + offset, mask, 0.0).to(tl.float32)
    d2 = tl.load(dout_ptr + (4 * row + 2) * filters + offset, mask, 0.0).to(tl.float32)
    d3 = tl.load(dout_ptr + (4 * row + 3) * filters + offset, mask, 0.0).to(tl.float32)
    return d2 + d3, d1 + d2, d0 + d1


@triton.jit
def _store_sums(dweight_ptr, d0, d1, d2, d3, channels, offset, mask):
    """One column of the gradient of a 3×3 kernel from that column of four rows."""
    dtype: tl.constexpr = dweight_ptr.dtype.element_ty
    tl.store(dweight_ptr + offset, tl.trans(d2 + d3).to(dtype), mask)
    tl.store(dweight_ptr + 3 * channels + offset, tl.trans(d1 + d2).to(dtype), mask)
    tl.store(dweight_ptr + 6 * channels + offset, tl.trans(d0 + d1).to(dtype), mask)


@Kernel
def _transposed_weights_backward_kernel(
    dout_ptr, dweight_ptr, filters, channels, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """dout: [channels, 4, 4, filters]; dweight: [filters, 3, 3, channels]."""
    blocks = tl.cdiv(channels, BLOCK_C)
    k = tl.program_id(0) // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    source = c[:, None].to(tl.int64) * 16 * filters + k[None, :]
    target = k[:, None].to(tl.int64) * 9 * channels + c[None, :]
    mask, target_mask = (
        (c < channels)[:, None] & (k < filters)[None, :],
        (k < filters)[:, None] & (c < channels)[None, :],
    )
    a0, a1, a2 = _sums(dout_ptr, 0, filters, source, mask)
    b0, b1, b2 = _sums(dout_ptr, 1, filters, source, mask)
    c0, c1, c2 = _sums(dout_ptr, 2, filters, source, mask)
    d0, d1, d2 = _sums(dout_ptr, 3, filters, source, mask)
    _store_sums(dweight_ptr, a0, b0, c0, d0, channels, target, target_mask)
    _store_sums(dweight_ptr + channels, a1, b1, c1, d1, channels, target, target_mask)
    _store_sums(dweight_ptr + 2 * channels, a2, b2, c2, d2, channels, target, target_mask)


def launch_transposed_weights(weight, dtype):
    """[K, C, 3, 3] → [C, K, 4, 4], channels-last."""
    filters, channels = weight.shape[:2]
    out = like_channels_last(weight, (channels, filters, 4, 4), dtype)
    _transposed_weights_kernel[_grid(filters, channels)](weight, out, filters, channels, **TILE)
    return out


def launch_transposed_weights_backward(dtransposed, dtype):
    """[C, K, 4, 4] → [K, C, 3, 3], channels-last."""
    channels, filters = dtransposed.shape[:2]
    dweight = like_channels_last(dtransposed, (filters, channels, 3, 3), dtype)
    _transposed_weights_backward_kernel[_grid(filters, channels)](dtransposed, dweight, filters, channels, **TILE)
    return dweight


def _grid(filters, channels):
    return (cdiv(filters, TILE["BLOCK_K"]) * cdiv(channels, TILE["BLOCK_C"]),)
