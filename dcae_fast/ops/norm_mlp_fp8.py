"""`norm_mlp` with products in 8-bit floating point, for training.

    s = x + gate · branch, or x;    y = norm(s) · scale + shift
    h = y · w1ᵀ + b1;    out = gelu(h) · w2ᵀ + b2   [+ s]

Shapes are the same as in `norm_mlp`; precision and gradients of the products as in linear_fp8.py. h is kept in half
precision. gelu(h) exists as 8-bit rows; the backward pass computes gelu(h) again, as in `mlp`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._block_half import INPUTS, define_half
from ._block_half_fp8 import HalfFp8
from .gelu_backward_rows import gelu_backward_rows_op
from .linear_fp8 import (
    GRADIENT,
    Gradient,
    check_no_transform,
    input_gradient,
    linear_fp8_backward,
    parameter_gradients,
    product,
    quantized,
    rounded_gradient,
)
from .norm_mlp import check_mlp


class MlpFp8Kept(NamedTuple):
    total: Tensor
    y: Tensor | None
    y_scale: Tensor
    h: Tensor


FIELDS = [*INPUTS.items(), ("act", str), ("everything", bool)]


class NormMlpFp8(HalfFp8, NamedTuple("NormMlpFp8Inputs", FIELDS)):
    """w_in, b_in: w1, b1; w_out, b_out: w2, b2."""

    __slots__ = ()
    name, Kept = "norm_mlp_fp8", MlpFp8Kept

    def forward(self, via):
        s, total, kept, rows = self.norm_rows(via)
        h = product(via, rows, self.w_in, self.b_in, None, self.dtype)
        added, dtype = (s, s.dtype) if self.residual else (None, self.dtype)
        out = product(via, quantized(via, h, self.act), self.w_out, self.b_out, added, dtype)
        return out, total, *kept, h

    def backward(self, via, dout, kept, wants):
        _, y, y_scale, h = kept
        of_out, everything = (wants.w_out, wants.b_out), self.everything
        gradient = rounded_gradient(via, dout, h.dtype, everything, *of_out)
        dg = input_gradient(via, gradient.rows, self.w_out, h.dtype)
        dh, *dh_rows, g, g_q, g_scale, db1 = via(gelu_backward_rows_op)(
            dg, h, self.act, GRADIENT, everything, wants.w_out
        )
        del dg
        x = None if everything else g, (g_q, g_scale)
        dw_out, db_out = parameter_gradients(via, gradient, *x, self.w_out, self.b_out, *of_out)
        del gradient, g, g_q, g_scale, x
        gradient, x = Gradient(None if everything else dh, dh_rows, db1), self.operands_of_w_in(y, y_scale)
        of_in = True, wants.w_in, wants.b_in
        dy, dw_in, db_in = linear_fp8_backward(via, gradient, *x, self.w_in, self.b_in, of_in, h.dtype)
        return dy, dw_in, db_in, dw_out, db_out


norm_mlp_fp8_op = define_half(NormMlpFp8)


def norm_mlp_fp8(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    residual: bool = False,
    act: str = "gelu",
    everything: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, out); see the head of this file, and `norm_mlp` for arguments and errors.

    everything: whether the gradients of the weights are 8-bit products too. Raises RuntimeError in torch.func and
    forward-mode AD.
    """
    check_no_transform("norm_mlp")
    dtype = dtype or x.dtype
    layers = w1, b1, w2, b2
    check_mlp(x, scale, shift, *layers, branch, gate, dtype, residual, act)
    out, total, *_ = norm_mlp_fp8_op(x, scale, shift, eps, branch, gate, dtype, *layers, residual, act, everything)
    return x if branch is None else total, out
