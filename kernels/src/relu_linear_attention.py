"""ReLU linear attention on a packed, channels-last qkv: [positions, heads, (q, k, v), D] per image.

For one head of one image, S = Σ_j relu(k_j) v_jᵀ and z = Σ_j relu(k_j). A state [D + 1, D] in fp32 holds the rows of S,
then z. The first kernel computes partial sums of S and z over splits of the positions, so that few images still fill
the GPU. The second kernel applies S and z to q. q, k and v are read once, and out is written once.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, fitting, like_channels_last, persistent_splits, relu
from .launch import Kernel
from .quantize import to_int8


@triton.jit
def _rows(n, positions, heads, bh, D: tl.constexpr, WIDTH: tl.constexpr):
    """Element offset of head bh's channels at positions n, for a tensor with WIDTH * D channels per head."""
    return ((bh // heads).to(tl.int64) * positions + n)[:, None] * (heads * WIDTH * D) + (bh % heads) * WIDTH * D


@triton.jit
def _dot(a, b, DTYPE: tl.constexpr):
    """a @ b of float32 tiles, more accurate than DTYPE: tf32 has ten mantissa bits, bfloat16 seven."""
    return tl.dot(a, b, input_precision="tf32" if DTYPE == tl.bfloat16 else "tf32x3")


@triton.jit
def _load_state(state_ptr, index, D: tl.constexpr):
    """S and z of one state."""
    d = tl.arange(0, D)
    state = state_ptr + index.to(tl.int64) * (D + 1) * D
    return tl.load(state + d[:, None] * D + d[None, :]), tl.load(state + D * D + d)


@triton.jit
def _store_state(state_ptr, index, s, z, D: tl.constexpr):
    d = tl.arange(0, D)
    state = state_ptr + index.to(tl.int64) * (D + 1) * D
    tl.store(state + d[:, None] * D + d[None, :], s)
    tl.store(state + D * D + d, z)


@Kernel
def _relu_linear_attention_state_kernel(
    qkv_ptr, state_ptr, positions, heads, splits, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    # tf32 represents half precision exactly
    PRECISION: tl.constexpr = "tf32x3" if qkv_ptr.dtype.element_ty == tl.float32 else "tf32"
    bh, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    d = tl.arange(0, D)
    s = tl.zeros((D, D), tl.float32)
    z = tl.zeros((D,), tl.float32)
    for block in range(split, tl.cdiv(positions, BLOCK_N), splits):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        row = qkv_ptr + _rows(n, positions, heads, bh, D, 3) + d[None, :]
        mask = (n < positions)[:, None]
        k = relu(tl.load(row + D, mask, 0.0).to(tl.float32))
        v = tl.load(row + 2 * D, mask, 0.0).to(tl.float32)
        s += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        z += tl.sum(k, 0)
    _store_state(state_ptr, tl.program_id(0), s, z, D)


@Kernel
def _relu_linear_attention_apply_kernel(
    qkv_ptr, state_ptr, out_ptr, factor_ptr, positions, heads, blocks, out_channels, out_start, eps,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    d = tl.arange(0, D)
    s, z = _load_state(state_ptr, bh, D)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (n < positions)[:, None]
    q = tl.load(qkv_ptr + _rows(n, positions, heads, bh, D, 3) + d[None, :], mask, 0.0)
    q = relu(q.to(tl.float32))
    out = _dot(q, s, qkv_ptr.dtype.element_ty) / (tl.sum(q * z[None, :], 1) + eps)[:, None]
    c = out_start + (bh % heads) * D + d
    offset = ((bh // heads).to(tl.int64) * positions + n)[:, None] * out_channels + c[None, :]
    if factor_ptr is not None:
        tl.store(out_ptr + offset, to_int8(out, tl.load(factor_ptr + c)[None, :]), mask)
    else:
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask)


@Kernel
def _relu_linear_attention_query_backward_kernel(
    dout_ptr, qkv_ptr, state_ptr, dqkv_ptr, dstate_ptr, positions, heads, splits, out_channels, out_start, eps,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Computes dq, and this split's partial sums of the gradients of S and z."""
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    bh, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    d = tl.arange(0, D)
    s, z = _load_state(state_ptr, bh, D)
    ds = tl.zeros((D, D), tl.float32)
    dz = tl.zeros((D,), tl.float32)
    for block in range(split, tl.cdiv(positions, BLOCK_N), splits):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (n < positions)[:, None]
        qkv_row = _rows(n, positions, heads, bh, D, 3) + d[None, :]
        out_row = ((bh // heads).to(tl.int64) * positions + n)[:, None] * out_channels + out_start + (bh % heads) * D
        q = relu(tl.load(qkv_ptr + qkv_row, mask, 0.0).to(tl.float32))
        dout = tl.load(dout_ptr + out_row + d[None, :], mask, 0.0).to(tl.float32)
        rest = 1.0 / (tl.sum(q * z[None, :], 1) + eps)
        out = _dot(q, s, DTYPE) * rest[:, None]
        dnumerator = dout * rest[:, None]
        ddenominator = -tl.sum(dout * out, 1) * rest
        dq = _dot(dnumerator, tl.trans(s), DTYPE) + ddenominator[:, None] * z[None, :]
        tl.store(dqkv_ptr + qkv_row, tl.where(q <= 0.0, 0.0, dq).to(dqkv_ptr.dtype.element_ty), mask)
        ds += _dot(tl.trans(q), dnumerator, DTYPE)
        dz += tl.sum(q * ddenominator[:, None], 0)
    _store_state(dstate_ptr, tl.program_id(0), ds, dz, D)


@Kernel
def _relu_linear_attention_key_value_backward_kernel(
    qkv_ptr, dstate_ptr, dqkv_ptr, positions, heads, blocks, D: tl.constexpr, BLOCK_N: tl.constexpr
):
    DTYPE: tl.constexpr = qkv_ptr.dtype.element_ty
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    d = tl.arange(0, D)
    ds, dz = _load_state(dstate_ptr, bh, D)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (n < positions)[:, None]
    row = _rows(n, positions, heads, bh, D, 3) + d[None, :]
    k = relu(tl.load(qkv_ptr + row + D, mask, 0.0).to(tl.float32))
    v = tl.load(qkv_ptr + row + 2 * D, mask, 0.0).to(tl.float32)
    dk = _dot(v, tl.trans(ds), DTYPE) + dz[None, :]
    dv = _dot(k, ds, DTYPE)
    tl.store(dqkv_ptr + row + D, tl.where(k <= 0.0, 0.0, dk).to(dqkv_ptr.dtype.element_ty), mask)
    tl.store(dqkv_ptr + row + 2 * D, dv.to(dqkv_ptr.dtype.element_ty), mask)


def _sizes(qkv, head_dim, block_n):
    """Positions, heads, (image, head) pairs, blocks of positions, and the number of splits that fills the GPU."""
    positions, heads = qkv.shape[2] * qkv.shape[3], qkv.shape[1] // (3 * head_dim)
    pairs, blocks = qkv.shape[0] * heads, cdiv(positions, block_n)
    return positions, heads, pairs, blocks, persistent_splits(qkv, blocks, pairs)


def _sum_of_splits(state):
    return state.sum(1) if state.shape[1] > 1 else state


def _state(qkv, head_dim):
    block_n = 128 if qkv.element_size() == 2 else 64
    positions, heads, pairs, _, splits = _sizes(qkv, head_dim, block_n)
    state = torch.empty(pairs, splits, head_dim + 1, head_dim, dtype=torch.float32, device=qkv.device)
    _relu_linear_attention_state_kernel[(pairs * splits,)](
        qkv, state, positions, heads, splits, D=head_dim, BLOCK_N=block_n
    )
    return _sum_of_splits(state)


def launch_relu_linear_attention(qkvs, head_dim, eps):
    return launch_relu_linear_attention_int8(qkvs, head_dim, eps, None)


def launch_relu_linear_attention_int8(qkvs, head_dim, eps, out_factor):
    """The result in the type of the qkvs if out_factor is None."""
    batch, _, height, width = qkvs[0].shape
    channels = sum(qkv.shape[1] for qkv in qkvs) // 3
    dtype = None if out_factor is None else torch.int8
    out, start = like_channels_last(qkvs[0], (batch, channels, height, width), dtype), 0
    for qkv in qkvs:
        positions, heads, pairs, blocks, _ = _sizes(qkv, head_dim, 128)
        if qkv.numel():
            _relu_linear_attention_apply_kernel[(pairs * blocks,)](
                qkv, _state(qkv, head_dim), out, out_factor, positions, heads, blocks, channels, start, eps,
                D=head_dim, BLOCK_N=128,
            )  # fmt: skip
        start += qkv.shape[1] // 3
    return out


def launch_relu_linear_attention_backward(dout, qkvs, head_dim, eps):
    dqkvs, start = [], 0
    (block_n,) = fitting(dout, 4, (64,), lambda size, n: 2 * size * head_dim * (n + head_dim))
    for qkv in qkvs:
        dqkv = like_channels_last(qkv)
        positions, heads, pairs, blocks, splits = _sizes(qkv, head_dim, block_n)
        if qkv.numel():
            dstate = torch.empty(pairs, splits, head_dim + 1, head_dim, dtype=torch.float32, device=qkv.device)
            _relu_linear_attention_query_backward_kernel[(pairs * splits,)](
                dout, qkv, _state(qkv, head_dim), dqkv, dstate, positions, heads, splits, dout.shape[1], start, eps,
                D=head_dim, BLOCK_N=block_n, num_warps=4 if qkv.element_size() == 2 else 8,
            )  # fmt: skip
            _relu_linear_attention_key_value_backward_kernel[(pairs * blocks,)](
                qkv, _sum_of_splits(dstate), dqkv, positions, heads, blocks, D=head_dim, BLOCK_N=block_n
            )
        dqkvs.append(dqkv)
        start += qkv.shape[1] // 3
    return dqkvs
