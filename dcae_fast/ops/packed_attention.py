"""Softmax attention on the packed output of a qkv projection.

    out = softmax(q kᵀ / √D) v    for each head

qkv: [B, N, 3 * heads * D], channels [q, k, v], each [heads, D]; out: [B, N, heads * D]. Softmax in fp32.

The operator is for few tokens in half precision: its kernels keep whole heads on chip. For the backward pass it also
returns lse: [B, heads, N] in fp32, the logarithm of the softmax's denominator. All other attention goes to
`scaled_dot_product_attention`, which prefers a recent cuDNN on Hopper.
"""

import torch
import torch.nn.functional as F

from . import _library
from ._library import HALVES, define, differentiable, differentiable_as, halves_on_hopper, without_autocast

HEAD_DIMS = (64, 72)
MAX_TOKENS = 320


def _unpack(qkv, num_heads):
    """q, k, v: [B, heads, N, D] each."""
    batch, tokens, channels = qkv.shape
    return qkv.reshape(batch, tokens, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def _pack(x):
    """[B, heads, N, D] to [B, N, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


@without_autocast
def packed_attention_reference(qkv, num_heads):
    q, k, v = _unpack(_wide(qkv), num_heads)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return _pack(scores.softmax(-1) @ v).to(qkv.dtype), scores.detach().logsumexp(-1)


@without_autocast
def packed_attention_backward_reference(dout, qkv, out, lse, num_heads):
    """Reads only dout and qkv, so that the gradient can be differentiated again. The kernel also uses out and lse."""
    q, k, v = _unpack(_wide(qkv), num_heads)
    scale = q.shape[-1] ** -0.5
    dout = _wide(dout).reshape(*dout.shape[:2], num_heads, q.shape[-1]).transpose(1, 2)
    p = (q @ k.transpose(-1, -2) * scale).softmax(-1)
    dp = dout @ v.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    return torch.cat([_pack(dx) for dx in (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout)], -1).to(
        qkv.dtype
    )


def fits(dtype, tokens, dim):
    return dtype in HALVES and 0 < tokens <= MAX_TOKENS and dim in HEAD_DIMS


def _accepts(qkv, num_heads):
    return fits(qkv.dtype, qkv.shape[1], qkv.shape[2] // (3 * num_heads))


packed_attention_op = define(
    "packed_attention(Tensor qkv, int num_heads) -> (Tensor out, Tensor lse)",
    packed_attention_reference,
    _accepts,
    packed_attention_reference,
    lambda qkv, _: halves_on_hopper(qkv),
)
packed_attention_backward_op = define(
    "packed_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int num_heads) -> Tensor",
    packed_attention_backward_reference,
    lambda dout, qkv, out, lse, num_heads: _accepts(qkv, num_heads),
    packed_attention_backward_reference,
    lambda dout, qkv, out, lse, _: halves_on_hopper(dout, qkv, out),
)


def _setup_context(ctx, inputs, output):
    qkv, ctx.num_heads = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _):
    return packed_attention_backward_op(dout, *ctx.saved_tensors, ctx.num_heads), None


differentiable(packed_attention_op, _backward, _setup_context)
differentiable_as(packed_attention_backward_op, packed_attention_backward_reference)


def is_for_few_tokens(dtype: torch.dtype, tokens: int, dim: int, device: torch.device) -> bool:
    """Whether the operator is the fastest attention for these heads. True on a CPU too, where its reference runs."""
    if device.type == "cuda" and not (_library.HAS_EXTENSION and _library.is_hopper(device)):
        return False
    return device.type in ("cuda", "cpu") and fits(dtype, tokens, dim)


def packed_attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Multi-head softmax attention: [B, N, 3 * num_heads * D] packed q, k, v to [B, N, num_heads * D], in qkv's dtype.

    Raises ValueError unless qkv has three dimensions and channels that 3 * num_heads divides.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv is {list(qkv.shape)} with num_heads={num_heads}; expected [B, N, a multiple of 3 * num_heads]"
        )
    if is_for_few_tokens(qkv.dtype, qkv.shape[1], qkv.shape[2] // (3 * num_heads), qkv.device):
        return packed_attention_op(qkv, num_heads)[0]
    return _pack(F.scaled_dot_product_attention(*_unpack(qkv, num_heads)))
