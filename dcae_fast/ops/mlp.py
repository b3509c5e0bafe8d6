"""Two linear layers with GELU between them.

    h = x · w1ᵀ + b1,    y = gelu(h) · w2ᵀ + b2 + residual

x: [..., K]; w1: [H, K]; w2: [M, H]; residual and y: [..., M]. Exactness, types and sums as in `linear`.

For the gradient x and h are kept, as torch.compile would, and gelu(h) is computed again in one pass over h: as large as
h, it would add a third to what a transformer's block keeps. All else of the backward lies in its four products:

    dh = (dy · w2) * gelu'(h), db1 = Σ dh;    dw2 = dyᵀ · gelu(h), db2 = Σ dy;    dx = dh · w1;    dw1 = dhᵀ · x
"""

import torch
import torch.nn.functional as F

from . import _products
from ._library import define, differentiable, differentiable_as
from .linear import (
    ACTIVATIONS,
    accepts_layer,
    as_rows,
    check_layer,
    input_gradient,
    launch_layer,
    linear,
    linear_reference,
    parameter_gradients,
    wants_gradient,
    without_autocast,
)


@without_autocast
def mlp_reference(x, w1, b1, w2, b2, residual, act):
    h = linear_reference(x, w1, b1, None)
    return linear_reference(F.gelu(h, approximate=ACTIVATIONS[act]), w2, b2, residual), h


@without_autocast
def mlp_hidden_gradient_reference(dy, w2, h, act):
    dh = torch.ops.aten.gelu_backward(dy @ w2, h, approximate=ACTIVATIONS[act])
    return dh, dh.sum(0)


def _accepts(x, w1, b1, w2, b2, residual, act):
    return accepts_layer(x, w1, b1, None) and accepts_layer(x, w2, b2, residual)


def _accepts_gradient(dy, w2, h, act):
    is_precise = act == "gelu_tanh" or dy.dtype == torch.bfloat16
    return is_precise and dy.dtype == h.dtype and _products.accepts(dy, w2, h)


def _launch(x, w1, b1, w2, b2, residual, act):
    def fallback():
        h = linear_reference(x, w1, b1, None)
        return F.gelu(h, approximate=ACTIVATIONS[act]), h

    epilogue = "gelu_aux" if b1 is None else "gelu_aux_bias"
    g, h = _products.product(fallback, x, w1, epilogue, right_transposed=True, bias=b1)
    return launch_layer(g, w2, b2, residual), h


def _launch_gradient(dy, w2, h, act):
    def fallback():
        return mlp_hidden_gradient_reference(dy, w2, h, act)

    return _products.product(fallback, dy, w2, "dgelu_bgrad", preactivation=h)


_mlp = define(
    "mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, str act) -> (Tensor, Tensor)",
    mlp_reference,
    _accepts,
    _launch,
)
_hidden_gradient = define(
    "mlp_hidden_gradient(Tensor dy, Tensor w2, Tensor h, str act) -> (Tensor, Tensor)",
    mlp_hidden_gradient_reference,
    _accepts_gradient,
    _launch_gradient,
)


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, b2, residual, ctx.act = inputs
    ctx.save_for_backward(x, w1, w2, output[1])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (b1, b2, residual)]
    ctx.set_materialize_grads(False)  # nobody but the gradient of the gradient has one for h


def _gradient(ctx, dy, dh_of_h):
    x, w1, w2, h = ctx.saved_tensors
    wants_x, wants_w1, wants_b1, wants_w2, wants_b2, wants_residual, _ = ctx.needs_input_grad
    b1_dtype, b2_dtype, residual_dtype = ctx.dtypes
    dy = x.new_zeros(x.shape[0], w2.shape[0]) if dy is None else dy
    dresidual = dy.to(residual_dtype) if wants_residual else None
    dy = dy.to(x.dtype)
    g = F.gelu(h, approximate=ACTIVATIONS[ctx.act]) if wants_w2 else None
    dw2, db2 = parameter_gradients(dy, g, b2_dtype, wants_w2, wants_b2)
    del g  # as large as dh
    dx = dw1 = db1 = None
    if wants_x or wants_w1 or wants_b1:
        dh, db1 = _hidden_gradient(dy, w2, h, ctx.act)
        if dh_of_h is not None:
            dh, db1 = dh + dh_of_h, db1 + dh_of_h.sum(0)
        db1 = db1.to(b1_dtype) if wants_b1 else None
        dx = input_gradient(dh, w1) if wants_x else None
        dw1, _ = parameter_gradients(dh, x, None, wants_w1, False)
    return dx, dw1, db1, dw2, db2, dresidual, None


differentiable(_mlp, _gradient, _setup_context)
differentiable_as(_hidden_gradient, mlp_hidden_gradient_reference)


def mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    act: str = "gelu",
) -> torch.Tensor:
    """gelu(x · w1ᵀ + b1) · w2ᵀ + b2 + residual; see the head of this file.

    act: "gelu" or "gelu_tanh". Returns [..., M], contiguous, in the common type of x and residual. Raises ValueError on
    other activations, shapes that do not fit, and unless the weights have x's type.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}; expected one of {tuple(ACTIVATIONS)}")
    if not wants_gradient(x, w1, b1, w2, b2, residual):
        return linear(linear(x, w1, b1, act=act), w2, b2, residual)
    check_layer(x.shape, x.dtype, w1, b1)
    check_layer((*x.shape[:-1], w1.shape[0]), x.dtype, w2, b2, residual)
    y, _ = _mlp(as_rows(x), w1, b1, w2, b2, as_rows(residual), act)
    return y.view(*x.shape[:-1], w2.shape[0])
