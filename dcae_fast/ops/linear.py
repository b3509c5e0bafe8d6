"""Linear layer with what follows it, in one product.

    y = act(x · weightᵀ + bias) + residual

x: [..., K]; weight: [M, K]; bias: [M]; residual and y: [..., M]. Sums in fp32. In half precision on a GPU, with K and M
multiples of 8, cuBLASLt computes bias, residual or activation within the product, and nothing is rounded before y is;
otherwise PyTorch does. The residual may be of higher precision than x, and then y is; a bias of other precision is
brought to x's, or to y's where it is added within. A float32 weight is rounded to x's precision, for the gradient once
more: that takes no longer than to keep it and to round its own gradient, which is float32 thus.

"gelu" is the exact one, with erf. In half precision on a GPU cuBLASLt computes both forms of GELU by the tanh
approximation, which is off by 2e-4 in relative L2 on normal preactivations; rounding them and the result is off by 3e-3
in bf16, 3e-4 in fp16. Their gradients are exact.

The gradients are products too: of dy and weight; and of dyᵀ and x, whose epilogue sums dy for the bias. An activation
gets its gradient from PyTorch; where there is one, and a second layer after it, `mlp` is faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import _products
from ._library import HALVES, define, differentiable, differentiable_as, without_autocast
from ._private import addmm_activation
from ._products import as_rows

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # as PyTorch's functions name the approximation


@without_autocast
def linear_reference(x, weight, bias, residual):
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if residual is None else y + residual


@without_autocast
def linear_gelu_reference(x, weight, bias, act):
    return F.gelu(linear_reference(x, weight, bias, None), approximate=ACTIVATIONS[act])


@without_autocast
def linear_input_gradient_reference(dy, weight):
    return dy @ weight.to(dy.dtype)


@without_autocast
def linear_weight_gradient_reference(dy, x, bias, dtype):
    dy, x = as_rows(dy).to(dtype), as_rows(x).to(dtype)
    return dy.T @ x, dy.sum(0) if bias else dy.new_empty(0)


def accepts_layer(x, weight, bias, residual):
    return _products.accepts(x, weight, bias, residual) and weight.shape[0] % 8 == 0


def launch_layer(x, weight, bias, residual):
    weight = weight.to(x.dtype)

    def fallback():
        return (linear_reference(x, weight, bias, residual),)

    epilogue = _products.epilogue("", bias)
    return _products.product(fallback, x, weight, epilogue, right_transposed=True, bias=bias, residual=residual)[0]


def _launch_linear_gelu(x, weight, bias, act):
    weight = weight.to(x.dtype)

    @without_autocast
    def fallback():
        if bias is None:
            return (F.gelu(x @ weight.T, approximate="tanh"),)
        y = addmm_activation(bias.to(x.dtype), as_rows(x), weight.T, use_gelu=True)
        return (y.view(*x.shape[:-1], -1),)

    epilogue = _products.epilogue("gelu", bias)
    return _products.product(fallback, x, weight, epilogue, right_transposed=True, bias=bias)[0]


def _launch_input_gradient(dy, weight):
    weight = weight.to(dy.dtype)
    return _products.product(lambda: (linear_input_gradient_reference(dy, weight),), dy, weight)[0]


def _launch_weight_gradient(dy, x, bias, dtype):
    dy, x = as_rows(dy), as_rows(x)

    def fallback():
        if dtype == dy.dtype:
            return linear_weight_gradient_reference(dy, x, bias, dtype)
        return torch.mm(dy.T, x, out_dtype=dtype), dy.sum(0, dtype=dtype) if bias else dy.new_empty(0, dtype=dtype)

    results = _products.product(fallback, dy, x, "bgrad" if bias else "none", left_transposed=True, dtype=dtype)
    return results if len(results) == 2 else (*results, dy.new_empty(0, dtype=dtype))


linear_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    linear_reference,
    accepts_layer,
    launch_layer,
)
linear_gelu_op = define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor",
    linear_gelu_reference,
    lambda x, weight, bias, act: accepts_layer(x, weight, bias, None),
    _launch_linear_gelu,
)
input_gradient = define(
    "linear_input_gradient(Tensor dy, Tensor weight) -> Tensor",
    linear_input_gradient_reference,
    _products.accepts,
    _launch_input_gradient,
)
weight_gradient = define(
    "linear_weight_gradient(Tensor dy, Tensor x, bool bias, ScalarType dtype) -> (Tensor, Tensor)",
    linear_weight_gradient_reference,
    lambda dy, x, bias, dtype: _products.accepts(dy, x) and dy.dtype == x.dtype and dtype in (x.dtype, torch.float32),
    _launch_weight_gradient,
)


@dataclass(frozen=True)
class Gradients:
    """What the gradients of layers are made of: the two operators above, their kernels, or their references."""

    input_gradient: Callable
    weight_gradient: Callable

    def of_parameters(self, dy, x, weight, bias, wants_weight, wants_bias):
        """Of weight and bias, each None unless wanted."""
        if wants_weight:
            dweight, dbias = self.weight_gradient(dy, x, wants_bias, weight.dtype)
        else:
            dweight, dbias = None, as_rows(dy).sum(0, dtype=bias.dtype) if wants_bias else None
        return dweight, dbias.to(bias.dtype) if wants_bias else None

    def of_layer(self, dy, x, weight, bias, wants_x, wants_weight, wants_bias):
        """Of x, weight and bias, each None unless wanted. dy: in x's type."""
        dx = self.input_gradient(dy, weight) if wants_x else None
        return dx, *self.of_parameters(dy, x, weight, bias, wants_weight, wants_bias)


OPERATORS = Gradients(input_gradient, weight_gradient)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bias)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype


def _gradient(ctx, dy):
    *wants, wants_residual = ctx.needs_input_grad
    x, weight, bias = ctx.saved_tensors
    dresidual = dy.to(ctx.residual_dtype) if wants_residual else None
    return *OPERATORS.of_layer(dy.to(ctx.x_dtype), x, weight, bias, *wants), dresidual


differentiable(linear_op, _gradient, _setup_context)
differentiable_as(linear_gelu_op, linear_gelu_reference)
differentiable_as(input_gradient, linear_input_gradient_reference)
differentiable_as(weight_gradient, linear_weight_gradient_reference)


def check_layer(shape, dtype, weight, bias, residual=None):
    """Raises ValueError unless these are the operands of a linear layer for an x of this shape and dtype."""
    known = weight.dtype == dtype or (weight.dtype == torch.float32 and dtype in HALVES)
    if weight.dim() != 2 or not shape or shape[-1] != weight.shape[1] or not known:
        raise ValueError(
            f"x is {dtype} {list(shape)}, weight {weight.dtype} {list(weight.shape)}:"
            " expected [..., K] and [M, K] of one type, or weight in float32"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; expected [{weight.shape[0]}], one for each output")
    if residual is not None and residual.shape != (*shape[:-1], weight.shape[0]):
        raise ValueError(f"residual is {list(residual.shape)}; expected {[*shape[:-1], weight.shape[0]]}")


def with_rows(layer, x, *parameters, residual, act):
    """layer(...) for an x of more than three dimensions; one of four would be an image to the operators."""
    rows = None if residual is None else as_rows(residual)
    return layer(as_rows(x), *parameters, residual=rows, act=act).unflatten(0, x.shape[:-1])


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    act: str = "none",
) -> torch.Tensor:
    """act(x · weightᵀ + bias) + residual; see the head of this file.

    act: "none", "gelu" or "gelu_tanh". Returns [..., M], contiguous, in the common type of x and residual. Raises
    ValueError on other activations, shapes that do not fit, and unless weight has x's type, or float32 for half an x.
    """
    if act != "none" and act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}; expected one of {('none', *ACTIVATIONS)}")
    check_layer(x.shape, x.dtype, weight, bias, residual)
    if x.dim() > 3:
        return with_rows(linear, x, weight, bias, residual=residual, act=act)
    if act == "none":
        return linear_op(x, weight, bias, residual)
    if wants_gradient(x, weight, bias):
        y = F.gelu(linear_op(x, weight, bias, None), approximate=ACTIVATIONS[act])
    else:
        y = linear_gelu_op(x, weight, bias, act)
    return y if residual is None else y + residual
