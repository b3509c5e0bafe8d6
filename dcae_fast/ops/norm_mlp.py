"""The second half of a transformer block: layer norm and MLP.

    s = x + gate · branch, or x;    y = norm(s) · scale + shift
    out = gelu(y · w1ᵀ + b1) · w2ᵀ + b2   [+ s]

x, branch, s: [B, N, D]; scale, shift: [D] or [B, D]; gate: [B, D]; w1: [H, D]; w2: [D, H]; out: [B, N, D]. The
kernels, types, precision and kept tensors are those of `layer_norm`, `linear` and `mlp`. For fused calls and float32
weights see _block_half.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._block_half import INPUTS, Half, define_half
from ._library import cuda_extension
from .layer_norm import check_norm
from .linear import check_layer, linear_gelu_op, linear_op, wants_gradient
from .mlp import check_activation, mlp_backward, mlp_op


class MlpKept(NamedTuple):
    total: Tensor
    y: Tensor | None
    h: Tensor


class NormMlp(Half, NamedTuple("NormMlpInputs", [*INPUTS.items(), ("act", str), ("trains", bool)])):
    """w_in, b_in: w1, b1; w_out, b_out: w2, b2. trains: whether y and h, the preactivation, are kept, or both empty."""

    __slots__ = ()
    name, Kept = "norm_mlp", MlpKept

    def forward(self, via):
        s, total, y = self.norm(via)
        added = s if self.residual else None
        if self.trains:
            out, h = via(mlp_op)(y, self.w_in, self.b_in, self.w_out, self.b_out, added, self.act)
            return out, total, y, h
        g = via(linear_gelu_op)(y, self.w_in, self.b_in, self.act)
        return via(linear_op)(g, self.w_out, self.b_out, added, False), total, y.new_empty(0), y.new_empty(0)

    def backward(self, via, dout, kept, wants):
        _, y, h = kept
        layers = self.w_in, self.b_in, self.w_out, self.b_out
        wanted = True, wants.w_in, wants.b_in, wants.w_out, wants.b_out
        return mlp_backward(via, dout.to(h.dtype), y, *layers, h, self.act, wanted)

    def activation(self):
        return "gelu_aux" if self.trains else "gelu"

    def fused_forward(self):
        plans = self.forward_plans()
        return cuda_extension().norm_mlp(*self, *plans) if plans else None

    def fused_backward(self, dout, kept, wants):
        _, y, h = kept
        plans = self.backward_plans(dout, wants, False, y, h)
        layers = self.w_in, self.b_in, self.w_out, self.b_out
        return cuda_extension().norm_mlp_backward(dout, y, h, *layers, self.act, *plans) if plans else None


norm_mlp_op = define_half(NormMlp)


def check_mlp(x, scale, shift, w1, b1, w2, b2, branch, gate, dtype, residual, act):
    """Raises ValueError as `norm_mlp` does."""
    check_norm(x, scale, shift, branch, gate)
    check_activation(act)
    check_layer(x.shape, dtype, w1, b1)
    check_layer((*x.shape[:2], w1.shape[0]), dtype, w2, b2, x if residual else None)


def norm_mlp(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, out); see the head of this file.

    x, branch: [B, N, D]; scale, shift: [D] or [B, D]; gate: [B, D]; w1: [H, D]; w2: [D, H]; act: "gelu" or "gelu_tanh".
    dtype: of y and of everything that is computed from y, by default the type of x. residual: whether s is added to
    out, which then has the type of s. Raises ValueError on other activations, on shapes that do not fit, and unless
    each weight has type `dtype`, or is float32 beside a half-precision `dtype`.
    """
    dtype = dtype or x.dtype
    layers = w1, b1, w2, b2
    check_mlp(x, scale, shift, *layers, branch, gate, dtype, residual, act)
    trains = wants_gradient(x, scale, shift, branch, gate, *layers)
    out, total, *_ = norm_mlp_op(x, scale, shift, eps, branch, gate, dtype, *layers, residual, act, trains)
    return x if branch is None else total, out
