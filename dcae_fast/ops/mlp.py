"""Two linear layers with GELU between them.

    h = x · w1ᵀ + b1,    y = gelu(h) · w2ᵀ + b2 + residual

x: [..., K]; w1: [H, K]; w2: [M, H]; residual and y: [..., M]. Precision, types and sums are as in `linear`.

The backward pass needs h, which is kept, and x for the gradient of w1, as with torch.compile. gelu(h) is as large as h
and would add a third to the memory that a transformer block keeps, so gelu(h) is computed again in the pass that
computes dh. Everything else is a product:

    dg = dy · w2;    dh = dg * gelu'(h), g = gelu(h), db1 = Σ dh
    dw2 = dyᵀ · g, db2 = Σ dy;    dx = dh · w1, dw1 = dhᵀ · x
"""

import torch
import torch.nn.functional as F

from . import _products
from ._library import KERNEL_DTYPES, define, differentiable, differentiable_as, halves_on_hopper, without_autocast
from ._parts import as_operator
from ._products import as_rows
from .linear import (
    ACTIVATIONS,
    accepts_layer,
    check_layer,
    launch_linear,
    linear,
    linear_backward,
    linear_backward_input_op,
    linear_reference,
    rounded,
    wants_gradient,
    with_rows,
)


@without_autocast
def mlp_reference(x, w1, b1, w2, b2, residual, act):
    h = linear_reference(x, w1, b1, None)
    return linear_reference(F.gelu(h, approximate=ACTIVATIONS[act]), w2, b2, residual), h


@without_autocast
def gelu_backward_reference(dg, h, act, wants_g):
    approximate, wide = ACTIVATIONS[act], torch.promote_types(h.dtype, torch.float32)
    dh = torch.ops.aten.gelu_backward(dg, h, approximate=approximate)
    g = F.gelu(h, approximate=approximate) if wants_g else h.new_empty(0)
    return dh, g, as_rows(dh).sum(0, dtype=wide)


def _accepts(x, w1, b1, w2, b2, residual, act):
    return accepts_layer(x, w1, b1, None) and accepts_layer(x, w2, b2, residual)


def _launch(x, w1, b1, w2, b2, residual, act):
    w1 = rounded(w1, x.dtype)

    def fallback():
        h = linear_reference(x, w1, b1, None)
        return F.gelu(h, approximate=ACTIVATIONS[act]), h

    epilogue = _products.epilogue("gelu_aux", b1)
    g, h = _products.product(fallback, x, w1, epilogue, right_transposed=True, bias=b1)
    return launch_linear(g, w2, b2, residual), h


mlp_op = define(
    "mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, str act) -> (Tensor, Tensor)",
    mlp_reference,
    _accepts,
    _launch,
)
gelu_backward_op = define(
    "gelu_backward(Tensor dg, Tensor h, str act, bool wants_g) -> (Tensor, Tensor, Tensor)",
    gelu_backward_reference,
    lambda dg, h, act, wants_g: dg.dtype == h.dtype and h.dtype in KERNEL_DTYPES,
    "gelu_backward",
    lambda dg, h, act, wants_g: h.numel() > 0 and h.shape[-1] % 8 == 0 and halves_on_hopper(dg, h),
)


def mlp_backward(via, dy, x, w1, b1, w2, b2, h, act, wants, dh_of_h=None):
    """The gradients of x, w1, b1, w2 and b2; None where `wants` says that it is not wanted. dy: of x's type.

    x is read only for the gradient of w1. dh_of_h: the gradient of h as a result of the operator, if there is one.
    via: see _parts.py.
    """
    wants_x, wants_w1, wants_b1, wants_w2, wants_b2 = wants
    dh, g, db1 = via(gelu_backward_op)(via(linear_backward_input_op)(dy, w2), h, act, wants_w2)
    _, dw2, db2 = linear_backward(via, dy, g, w2, b2, (False, wants_w2, wants_b2))
    del g  # as large as dh
    if dh_of_h is not None:
        dh, db1 = dh + dh_of_h, db1 + as_rows(dh_of_h).sum(0, dtype=db1.dtype)
    dx, dw1, _ = linear_backward(via, dh, x, w1, b1, (wants_x, wants_w1, False))
    return dx, dw1, db1.to(b1.dtype) if wants_b1 else None, dw2, db2


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, b2, residual, ctx.act = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w1, b1, w2, b2, output[1])
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)  # h has a gradient only in the gradient of the gradient


def _backward(ctx, dy, dh_of_h):
    *wants, wants_residual, _ = ctx.needs_input_grad
    x, w1, b1, w2, b2, h = ctx.saved_tensors
    dy = h.new_zeros(*h.shape[:-1], w2.shape[0]) if dy is None else dy
    dresidual = dy.to(ctx.residual_dtype) if wants_residual else None
    return *mlp_backward(as_operator, dy.to(h.dtype), x, w1, b1, w2, b2, h, ctx.act, wants, dh_of_h), dresidual, None


differentiable(mlp_op, _backward, _setup_context)
differentiable_as(gelu_backward_op, gelu_backward_reference)


def check_activation(act):
    """Raises ValueError unless this is a form of GELU."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}; expected one of {tuple(ACTIVATIONS)}")


def mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    act: str = "gelu",
) -> torch.Tensor:
    """gelu(x · w1ᵀ + b1) · w2ᵀ + b2 + residual; precision and types: see the head of linear.py.

    x: [..., K]; w1: [H, K]; b1: [H]; w2: [M, H]; b2: [M]; residual: [..., M]; act: "gelu" or "gelu_tanh". Returns
    [..., M], contiguous, in the promoted type of x and residual. Raises ValueError on other activations, on shapes that
    do not fit, and unless each weight has the type of x, or is float32 beside half-precision x.
    """
    check_activation(act)
    if not wants_gradient(x, w1, b1, w2, b2, residual):
        return linear(linear(x, w1, b1, act=act), w2, b2, residual)
    check_layer(x.shape, x.dtype, w1, b1)
    check_layer((*x.shape[:-1], w1.shape[0]), x.dtype, w2, b2, residual)
    if x.dim() > 3:
        return with_rows(mlp, x, w1, b1, w2, b2, residual=residual, act=act)
    return mlp_op(x, w1, b1, w2, b2, residual, act)[0]
