"""The first half of a transformer block: layer norm, softmax attention, and the linear layers around the attention.

    s = x + gate · branch, or x;    y = norm(s) · scale + shift
    out = attention(y · w_qkvᵀ + b_qkv) · w_projᵀ + b_proj   [+ s]

x, branch, s: [B, N, D]; scale, shift: [D] or [B, D]; gate: [B, D]; w_qkv: [3 M, D]; w_proj: [D, M]; out: [B, N, D].
The kernels, types, precision and kept tensors are the same as in `layer_norm`, `linear` and `packed_attention`. For
fused calls and float32 weights see _block_half.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._block_half import INPUTS, Half, define_half
from ._library import cuda_extension
from .layer_norm import check_norm
from .linear import check_layer, linear_backward, linear_op, wants_gradient
from .packed_attention import fits, packed_attention_backward_op, packed_attention_op


class AttentionKept(NamedTuple):
    total: Tensor
    y: Tensor | None
    qkv: Tensor
    attended: Tensor
    lse: Tensor


FIELDS = [*INPUTS.items(), ("num_heads", int), ("trains", bool)]


class NormAttention(Half, NamedTuple("NormAttentionInputs", FIELDS)):
    """w_in, b_in: w_qkv, b_qkv; w_out, b_out: w_proj, b_proj. attended: the result of the attention. trains: whether
    gradients are wanted.
    """

    __slots__ = ()
    name, Kept = "norm_attention", AttentionKept

    def forward(self, via):
        s, total, y = self.norm(via)
        qkv = via(linear_op)(y, self.w_in, self.b_in, None, self.trains)
        attended, lse = via(packed_attention_op)(qkv, self.num_heads)
        out = via(linear_op)(attended, self.w_out, self.b_out, s if self.residual else None, self.trains)
        return out, total, y, qkv, attended, lse

    def backward(self, via, dout, kept, wants):
        _, y, qkv, attended, lse = kept
        dattended, dw_out, db_out = linear_backward(
            via, dout.to(attended.dtype), attended, self.w_out, self.b_out, (True, wants.w_out, wants.b_out)
        )
        dqkv = via(packed_attention_backward_op)(dattended, qkv, attended, lse, self.num_heads)
        dy, dw_in, db_in = linear_backward(via, dqkv, y, self.w_in, self.b_in, (True, wants.w_in, wants.b_in))
        return dy, dw_in, db_in, dw_out, db_out

    def fuses(self):
        return fits(self.dtype, self.x.shape[1], self.w_in.shape[0] // (3 * self.num_heads))

    def fused_forward(self):
        plans = self.forward_plans() if self.fuses() else None
        return cuda_extension().norm_attention(*self, *plans) if plans else None

    def fused_backward(self, dout, kept, wants):
        _, y, qkv, attended, lse = kept
        plans = self.backward_plans(dout, wants, self.b_in is not None, y, qkv, attended)
        if plans and fits(qkv.dtype, qkv.shape[1], attended.shape[2] // self.num_heads):
            layers = self.w_in, self.b_in, self.w_out, self.b_out
            return cuda_extension().norm_attention_backward(
                dout, y, qkv, attended, lse, *layers, self.num_heads, *plans
            )
        return None


norm_attention_op = define_half(NormAttention)


def check_attention(x, scale, shift, w_qkv, b_qkv, w_proj, b_proj, num_heads, branch, gate, dtype, residual):
    """Raises ValueError as `norm_attention` does."""
    check_norm(x, scale, shift, branch, gate)
    check_layer(x.shape, dtype, w_qkv, b_qkv)
    if num_heads < 1 or w_qkv.shape[0] % (3 * num_heads):
        raise ValueError(f"w_qkv is {list(w_qkv.shape)}, num_heads {num_heads}: expected 3 * num_heads * D rows")
    check_layer((*x.shape[:2], w_qkv.shape[0] // 3), dtype, w_proj, b_proj, x if residual else None)


def norm_attention(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    w_qkv: torch.Tensor,
    b_qkv: torch.Tensor | None,
    w_proj: torch.Tensor,
    b_proj: torch.Tensor | None,
    num_heads: int,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    residual: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, out); see the head of this file.

    x, branch: [B, N, D]; scale, shift: [D] or [B, D]; gate: [B, D]; w_qkv: [3 M, D]; w_proj: [D, M]. dtype: of y and
    of everything that is computed from y, by default the type of x. residual: whether s is added to out, which then has
    the type of s. Meant for as few tokens as `is_for_few_tokens` allows. Raises ValueError on shapes that do not fit,
    and unless each weight has type `dtype`, or is float32 beside a half-precision `dtype`.
    """
    dtype = dtype or x.dtype
    layers = w_qkv, b_qkv, w_proj, b_proj
    check_attention(x, scale, shift, *layers, num_heads, branch, gate, dtype, residual)
    trains = wants_gradient(x, scale, shift, branch, gate, *layers)
    out, total, *_ = norm_attention_op(x, scale, shift, eps, branch, gate, dtype, *layers, residual, num_heads, trains)
    return x if branch is None else total, out
