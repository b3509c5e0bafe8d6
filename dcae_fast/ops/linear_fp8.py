"""Linear layer in 8-bit floating point, for training.

    y = q(x) · q(weight)ᵀ + bias + residual
    dx = q(dy) · q(weight);    dweight = dyᵀ · x, or q(dy)ᵀ · q(x) with everything;    dbias = Σ dy

x: [..., K]; weight: [M, K]; bias: [M]; residual and y: [..., M]. q rounds to 8 bit, with one scale for each row along
which the product sums: for each token of x and dy, for each output channel of the weight in y, for each input channel
in dx. Scales follow from the present values, without a history. On a GPU, y and dx are summed by fast accumulation, in
about 13 bits, whose error of 1e-3 is far below the rounding to 8 bit; the gradient of the weight, a sum over all
tokens, in fp32.

Without everything, the gradient of the weight is a product of x and dy in half precision, as in `linear`: x is kept.
With everything, its 8-bit rows are kept, which take half the memory, and both operands are transposed from 8-bit rows;
see quantize_columns.py. float32 weights are rounded once, to 8 bit; their gradients are not rounded.

There are no second derivatives, and no derivatives in torch.func and in forward-mode AD, where PyTorch would round them
to float8: there the operators raise RuntimeError.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ._library import KERNEL_DTYPES, define, differentiable
from ._parts import as_kernel, as_operator, as_reference
from ._private import in_transform
from ._products import as_rows
from .gradient_rows import gradient_rows_op
from .linear import check_layer, linear_backward_weight_op
from .linear_rows import linear_rows_op
from .quantize_columns import quantize_columns_op, transpose_rows_op
from .quantize_rows import quantize_rows_op

FORMAT = torch.float8_e4m3fn  # of activations and weights
GRADIENT = torch.float8_e4m3fn  # of gradients; e5m2, which has more range but less precision, follows bf16 less closely


def quantized(via, x, act="none", format=FORMAT):
    """8-bit rows and scales of act(x). via: see _parts.py."""
    return via(quantize_rows_op)(x, act, format)


def product(via, rows, weight, bias, residual, dtype):
    """The layer for 8-bit rows, a pair as `quantized` returns it. dtype: of the result, and of the residual."""
    return via(linear_rows_op)(*rows, *quantized(via, weight), bias, residual, dtype, True)


def input_gradient(via, rows, weight, dtype):
    """dy · weight for 8-bit rows of dy."""
    columns = via(quantize_columns_op)(weight, FORMAT)
    return via(linear_rows_op)(*rows, *columns, None, None, dtype, True)


def weight_gradient(via, dy_rows, x_rows, dtype):
    """dyᵀ · x for 8-bit rows of both."""
    dy, x = via(transpose_rows_op)(*dy_rows), via(transpose_rows_op)(*x_rows)
    return via(linear_rows_op)(*dy, *x, None, None, dtype, False)


class Gradient(NamedTuple):
    """The gradient of a layer's result in half precision, as 8-bit rows, and summed over rows; see gradient_rows.py.

    half is None with everything in 8 bit. total is None where the product for the gradient of the weight sums.
    """

    half: torch.Tensor | None
    rows: tuple[torch.Tensor, torch.Tensor]
    total: torch.Tensor | None


def rounded_gradient(via, dy, dtype, everything, wants_weight, wants_bias):
    """The `Gradient` for products in `dtype`. wants_weight, wants_bias: which gradients of the layer are wanted."""
    wants_sum = wants_bias and (everything or not wants_weight)
    if dy.dtype == dtype and not everything and not wants_sum:
        return Gradient(dy, quantized(via, dy, format=GRADIENT), None)
    wants_half = wants_weight and not everything
    half, *rows, total = via(gradient_rows_op)(dy, dtype, GRADIENT, wants_half, wants_sum)
    return Gradient(half if wants_half else None, tuple(rows), total if wants_sum else None)


def parameter_gradients(via, gradient, x, x_rows, weight, bias, wants_weight, wants_bias):
    """The gradients of weight and bias; None where they are not wanted. x: in half precision, None with everything in
    8 bit; x_rows: its 8-bit rows, read only with everything.
    """
    dweight, dbias = None, gradient.total
    if wants_weight and x is None:
        dweight = weight_gradient(via, gradient.rows, x_rows, weight.dtype)
    elif wants_weight:
        sums = wants_bias and dbias is None
        dweight, found = via(linear_backward_weight_op)(gradient.half, x, sums, weight.dtype)
        dbias = found if sums else dbias
    return dweight, dbias.to(bias.dtype) if wants_bias else None


def linear_fp8_backward(via, gradient, x, x_rows, weight, bias, wants, dtype):
    """The gradients of x, in `dtype`, of weight and bias; None where `wants` says that it is not wanted.

    Other arguments: as in `parameter_gradients`.
    """
    wants_x, *of_parameters = wants
    dx = input_gradient(via, gradient.rows, weight, dtype) if wants_x else None
    return dx, *parameter_gradients(via, gradient, x, x_rows, weight, bias, *of_parameters)


def check_no_transform(name: str) -> None:
    """Raises RuntimeError in torch.func and forward-mode AD."""
    if in_transform():
        raise RuntimeError(f"{name}_fp8 has no derivatives in torch.func and in forward-mode AD: call {name} there")


def _forward(via, x, weight, bias, residual, everything):
    rows = quantized(via, x)
    y = product(via, rows, weight, bias, residual, (x if residual is None else residual).dtype)
    return y, *(rows if everything else (x.new_empty(0), x.new_empty(0)))


def linear_fp8_reference(x, weight, bias, residual, everything):
    return _forward(as_reference, x, weight, bias, residual, everything)


linear_fp8_op = define(
    "linear_fp8(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool everything) -> (Tensor, Tensor, Tensor)",
    linear_fp8_reference,
    lambda x, *_: x.dtype in KERNEL_DTYPES,
    partial(_forward, as_kernel),
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, ctx.everything = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    keeps = ctx.needs_input_grad[1]
    kept = (None, *output[1:]) if ctx.everything else (x, None, None)
    ctx.save_for_backward(*(kept if keeps else (None,) * 3), weight, bias)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype


@once_differentiable
def _backward(ctx, dy, *_):
    *wants, wants_residual, _ = ctx.needs_input_grad
    if dy is None:
        return (None,) * 5
    x, *rows, weight, bias = ctx.saved_tensors
    dresidual = dy.to(ctx.residual_dtype) if wants_residual else None
    gradient = rounded_gradient(as_operator, dy.contiguous(), ctx.x_dtype, ctx.everything, *wants[1:])
    found = linear_fp8_backward(as_operator, gradient, x, rows, weight, bias, wants, ctx.x_dtype)
    return *found, dresidual, None


differentiable(linear_fp8_op, _backward, _setup_context)


def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    everything: bool = False,
) -> torch.Tensor:
    """x · weightᵀ + bias + residual with 8-bit products; see the head of this file.

    x: [..., K]; weight: [M, K]; bias: [M]; residual: [..., M]. everything: whether the gradient of the weight is an
    8-bit product too. Returns [..., M] in the type of the residual, without one in the type of x. Raises ValueError on
    shapes that do not fit, and unless the weight has the type of x, or is float32 beside half-precision x; RuntimeError
    in torch.func and forward-mode AD.
    """
    check_no_transform("linear")
    check_layer(x.shape, x.dtype, weight, bias, residual)
    if x.dim() <= 3:
        return linear_fp8_op(x, weight, bias, residual, everything)[0]
    rows = None if residual is None else as_rows(residual)  # an operator takes four dimensions for an image
    return linear_fp8_op(as_rows(x), weight, bias, rows, everything)[0].unflatten(0, x.shape[:-1])
