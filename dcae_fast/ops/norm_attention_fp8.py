"""`norm_attention` with products in 8-bit floating point, for training.

    s = x + gate · branch, or x;    y = norm(s) · scale + shift
    out = attention(y · w_qkvᵀ + b_qkv) · w_projᵀ + b_proj   [+ s]

Shapes are the same as in `norm_attention`; precision and gradients of the products as in linear_fp8.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._block_half import INPUTS, define_half
from ._block_half_fp8 import HalfFp8
from .linear_fp8 import check_no_transform, linear_fp8_backward, product, quantized, rounded_gradient
from .norm_attention import check_attention
from .packed_attention import packed_attention_backward_op, packed_attention_op


class AttentionFp8Kept(NamedTuple):
    total: Tensor
    y: Tensor | None
    y_scale: Tensor
    qkv: Tensor
    attended: Tensor
    lse: Tensor


FIELDS = [*INPUTS.items(), ("num_heads", int), ("everything", bool)]


class NormAttentionFp8(HalfFp8, NamedTuple("NormAttentionFp8Inputs", FIELDS)):
    """w_in, b_in: w_qkv, b_qkv; w_out, b_out: w_proj, b_proj. attended: the result of the attention."""

    __slots__ = ()
    name, Kept = "norm_attention_fp8", AttentionFp8Kept

    def forward(self, via):
        s, total, kept, rows = self.norm_rows(via)
        qkv = product(via, rows, self.w_in, self.b_in, None, self.dtype)
        attended, lse = via(packed_attention_op)(qkv, self.num_heads)
        added, dtype = (s, s.dtype) if self.residual else (None, self.dtype)
        out = product(via, quantized(via, attended), self.w_out, self.b_out, added, dtype)
        return out, total, *kept, qkv, attended, lse

    def backward(self, via, dout, kept, wants):
        _, y, y_scale, qkv, attended, lse = kept
        of_out, of_in, everything = (wants.w_out, wants.b_out), (wants.w_in, wants.b_in), self.everything
        dtype, gradient = qkv.dtype, rounded_gradient(via, dout, qkv.dtype, everything, *of_out)
        attended_rows = quantized(via, attended) if everything and wants.w_out else None
        x = None if everything else attended, attended_rows
        dattended, dw_out, db_out = linear_fp8_backward(
            via, gradient, *x, self.w_out, self.b_out, (True, *of_out), dtype
        )
        del gradient, attended_rows, x
        dqkv = via(packed_attention_backward_op)(dattended, qkv, attended, lse, self.num_heads)
        del dattended
        gradient, x = rounded_gradient(via, dqkv, dtype, everything, *of_in), self.operands_of_w_in(y, y_scale)
        dy, dw_in, db_in = linear_fp8_backward(via, gradient, *x, self.w_in, self.b_in, (True, *of_in), dtype)
        return dy, dw_in, db_in, dw_out, db_out


norm_attention_fp8_op = define_half(NormAttentionFp8)


def norm_attention_fp8(
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
    everything: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, out); see the head of this file, and `norm_attention` for arguments and errors.

    everything: whether the gradients of the weights are 8-bit products too. Raises RuntimeError in torch.func and
    forward-mode AD.
    """
    check_no_transform("norm_attention")
    dtype = dtype or x.dtype
    layers = w_qkv, b_qkv, w_proj, b_proj
    check_attention(x, scale, shift, *layers, num_heads, branch, gate, dtype, residual)
    out, total, *_ = norm_attention_fp8_op(
        x, scale, shift, eps, branch, gate, dtype, *layers, residual, num_heads, everything
    )
    return x if branch is None else total, out
