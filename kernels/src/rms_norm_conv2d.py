"""Channel RMS norm, activation and 3×3 convolution to N channels, where N is small.

The first kernel reads the channels of a position once, normalises them in registers and multiplies them by all nine
taps: z [positions, 9 N]. The second kernel computes each output as the sum of nine elements of its neighbours' z. If
the channels of a position do not fit into shared memory, the kernel of the RMS norm and PyTorch's convolution run
instead.
"""

import torch
import torch.nn.functional as F
import triton.language as tl

from .common import activate, cdiv, dot, fitting, like_channels_last, next_power_of_2, persistent_splits, rows_of
from .launch import Kernel
from .rms_norm import launch_rms_norm

# of the first kernel: elements of x in a tile, and of the weight on chip, if they fit; programs on a multiprocessor;
# warps and stages of a program
ELEMENTS, WEIGHTS, PER_PROCESSOR, WARPS, STAGES = 16384, 32768, 2, 4, 1
TILE_H, TILE_W = 8, 32  # of the second kernel


@Kernel
def _rms_norm_conv2d_taps_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, z_ptr, rows, channels, eps, blocks_t,
    N: tl.constexpr, COLUMNS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Column t of z is N · tap + filter. weight: [N, 9, channels]."""
    t = tl.program_id(0) % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    norm_weight = tl.load(norm_weight_ptr + c, c < channels, 0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + c, c < channels, 0.0).to(tl.float32)
    source = (t % N * 9 + t // N)[None, :] * channels + c[:, None]
    weight = tl.load(weight_ptr + source, (t < 9 * N)[None, :] & (c < channels)[:, None], 0.0)
    for block in range(tl.program_id(0) // blocks_t, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0) // blocks_t):
        row = tl.cast(block, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None]
        x = tl.load(x_ptr + row[:, None] * channels + c[None, :], mask & (c < channels)[None, :], 0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / channels + eps)
        y = activate(x * rstd[:, None] * norm_weight[None, :] + norm_bias[None, :], ACT)
        z = dot(y, weight, tl.zeros((BLOCK_ROWS, BLOCK_T), tl.float32))
        target = row[:, None] * COLUMNS + t[None, :]
        tl.store(z_ptr + target, z.to(z_ptr.dtype.element_ty), mask & (t < COLUMNS)[None, :])


@Kernel
def _rms_norm_conv2d_sum_kernel(
    z_ptr, bias_ptr, out_ptr, height, width, tiles_h, tiles_w,
    N: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, n, p = tl.program_id(0), tl.arange(0, BLOCK_N), tl.arange(0, TILE_H * TILE_W)
    first_h, first_w = tile // tiles_w % tiles_h * TILE_H, tile % tiles_w * TILE_W
    first = ((tile // (tiles_w * tiles_h)).to(tl.int64) * height + first_h) * width + first_w
    h, w, position = first_h + p // TILE_W, first_w + p % TILE_W, p // TILE_W * width + p % TILE_W
    total = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(9):
        i, j = tap // 3 - 1, tap % 3 - 1
        inside = (h + i >= 0) & (h + i < height) & (w + j >= 0) & (w + j < width)
        z = z_ptr + (first + i * width + j) * COLUMNS + tap * N
        offset = (position * COLUMNS)[:, None] + n[None, :]
        total += tl.load(z + offset, inside[:, None] & (n < N)[None, :], 0.0).to(tl.float32)
    mask = ((h < height) & (w < width))[:, None] & (n < N)[None, :]
    tl.store(out_ptr + first * N + (position * N)[:, None] + n[None, :], total.to(out_ptr.dtype.element_ty), mask)


def _taps(x, norm_weight, norm_bias, eps, act, weight):
    """z [positions, 9 N], with columns appended until a row is a multiple of 16 bytes; None if no tile fits."""
    rows, channels, filters = rows_of(x), x.shape[1], weight.shape[0]
    columns = cdiv(9 * filters, 8) * 8
    block_c = next_power_of_2(max(16, channels))
    sides = ELEMENTS // block_c, max(16, min(next_power_of_2(columns), WEIGHTS // block_c))
    sides = fitting(x, x.element_size(), sides, lambda size, p, t: size * (p + t) * block_c)
    if sides is None:
        return None
    block_rows, block_t = sides
    z = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    blocks, blocks_t = cdiv(rows, block_rows), cdiv(columns, block_t)
    splits = persistent_splits(x, blocks, blocks_t, PER_PROCESSOR)
    _rms_norm_conv2d_taps_kernel[(splits * blocks_t,)](
        x, norm_weight, norm_bias, weight, z, rows, channels, eps, blocks_t, N=filters, COLUMNS=columns, ACT=act,
        BLOCK_ROWS=block_rows, BLOCK_C=block_c, BLOCK_T=block_t,
        num_warps=WARPS if block_c <= 512 else 2 * WARPS, num_stages=STAGES,
    )  # fmt: skip
    return z


def launch_rms_norm_conv2d(x, norm_weight, norm_bias, eps, act, weight, bias):
    (batch, _, height, width), filters = x.shape, weight.shape[0]
    out = like_channels_last(x, (batch, filters, height, width))
    if x.numel():
        z = _taps(x, norm_weight, norm_bias, eps, act, weight)
        if z is None:
            y = launch_rms_norm(x, norm_weight, norm_bias, eps, act, None, x.dtype)
            return out.copy_(F.conv2d(y, weight, None if bias is None else bias.to(x.dtype), padding=1))
        tiles_h, tiles_w = cdiv(height, TILE_H), cdiv(width, TILE_W)
        _rms_norm_conv2d_sum_kernel[(batch * tiles_h * tiles_w,)](
            z, bias, out, height, width, tiles_h, tiles_w, N=filters, COLUMNS=z.shape[1], HAS_BIAS=bias is not None,
            TILE_H=TILE_H, TILE_W=TILE_W, BLOCK_N=next_power_of_2(filters),
        )  # fmt: skip
    return out
