"""Linear layer with an optional activation and residual.

    y = act(x · weightᵀ + bias) + residual

x: [..., K]; weight: [M, K]; bias: [M]; residual and y: [..., M]. Sums in fp32.

In half precision on a GPU, with K and M multiples of 8 and tensors aligned to 16 bytes, cuBLASLt adds bias and residual
or applies the activation within the product, and only y is rounded. In all other cases PyTorch computes the layer. The
residual may be more precise than x; y then has the residual's type. A bias of another type is converted to the type of
x, or to the type of y where cuBLASLt adds it.

A float32 weight beside half-precision x is rounded to the type of x for the product, in the forward and again in the
backward pass, and its gradient is float32. In inference, inside autocast, the rounded weight and bias are kept until
autocast ends, or until they train or change, as far as autograd counts changes.

"gelu" is the exact GELU, with erf. cuBLASLt computes "gelu" and "gelu_tanh" by the tanh approximation. On normal
preactivations its relative L2 error is 2e-4; rounding preactivation and result causes an error of 3e-3 in bf16 and 3e-4
in fp16. The gradients of both forms are exact.

The gradients are two products, dx = dy · weight and dweight = dyᵀ · x; the second one's epilogue sums dy for the bias.
PyTorch computes the gradient of the activation. For an activation between two layers, `mlp` is faster.
"""

import torch
import torch.nn.functional as F

from . import _plans, _products
from ._library import HALVES, cuda_extension, define, differentiable, differentiable_as, without_autocast
from ._parts import as_operator
from ._private import addmm_activation
from ._products import as_rows

ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}  # PyTorch's names of the approximation


@without_autocast
def linear_reference(x, weight, bias, residual, trains=True):
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if residual is None else y + residual


@without_autocast
def linear_gelu_reference(x, weight, bias, act):
    return F.gelu(linear_reference(x, weight, bias, None), approximate=ACTIVATIONS[act])


@without_autocast
def linear_backward_input_reference(dy, weight):
    return dy @ weight.to(dy.dtype)


@without_autocast
def linear_backward_weight_reference(dy, x, bias, dtype):
    dy, x = as_rows(dy).to(dtype), as_rows(x).to(dtype)
    return dy.T @ x, dy.sum(0) if bias else dy.new_empty(0)


def accepts_layer(x, weight, bias, residual, trains=True):
    return _products.accepts(x, weight, bias, residual) and weight.shape[0] % 8 == 0


def rounded(weight, dtype, trains=True):
    """weight, or a bias, in this dtype. Not trains: autocast keeps the result, see the head of this file."""
    if weight is None or weight.dtype == dtype:
        return weight
    extension = cuda_extension()
    return weight.to(dtype) if extension is None else extension.autocast_cast(weight, dtype, trains)


def launch_linear(x, weight, bias, residual, trains=True):
    weight = rounded(weight, x.dtype, trains)

    def fallback():
        return (linear_reference(x, weight, bias, residual),)

    epilogue = _products.epilogue("", bias)
    return _products.product(fallback, x, weight, epilogue, right_transposed=True, bias=bias, residual=residual)[0]


def _prepare_linear(x, weight, bias, residual, trains):
    """Runs the plan that is known by then for this shape, without looking at the arguments again."""
    if not _products.available():
        return None
    out_dtype = (x if residual is None else residual).dtype
    rounds = weight.dtype != x.dtype or (bias is not None and bias.dtype != out_dtype)
    rows, epilogue = x.numel() // x.shape[-1], _products.epilogue("", bias)
    key = _products.key_of_layer(x.dtype, rows, weight, epilogue, None if residual is None else out_dtype)

    def run(x, weight, bias, residual, trains):
        plan = _plans.found(key)
        if plan is None:
            return launch_linear(x, weight, bias, residual, trains)
        if rounds:
            weight, bias = rounded(weight, x.dtype, trains), rounded(bias, out_dtype, trains)
        return plan(x, weight, bias, residual)[0]

    return run


def _launch_linear_gelu(x, weight, bias, act):
    weight = rounded(weight, x.dtype, trains=False)

    @without_autocast
    def fallback():
        if bias is None:
            return (F.gelu(x @ weight.T, approximate="tanh"),)
        y = addmm_activation(bias.to(x.dtype), as_rows(x), weight.T, use_gelu=True)
        return (y.view(*x.shape[:-1], -1),)

    epilogue = _products.epilogue("gelu", bias)
    return _products.product(fallback, x, weight, epilogue, right_transposed=True, bias=bias)[0]


def _launch_linear_backward_input(dy, weight):
    weight = weight.to(dy.dtype)
    return _products.product(lambda: (linear_backward_input_reference(dy, weight),), dy, weight)[0]


def _launch_linear_backward_weight(dy, x, bias, dtype):
    dy, x = as_rows(dy), as_rows(x)

    def fallback():
        if dtype == dy.dtype:
            return linear_backward_weight_reference(dy, x, bias, dtype)
        return torch.mm(dy.T, x, out_dtype=dtype), dy.sum(0, dtype=dtype) if bias else dy.new_empty(0, dtype=dtype)

    results = _products.product(fallback, dy, x, "bgrad" if bias else "none", left_transposed=True, dtype=dtype)
    return results if len(results) == 2 else (*results, dy.new_empty(0, dtype=dtype))


linear_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, bool trains) -> Tensor",
    linear_reference,
    accepts_layer,
    launch_linear,
    prepare=_prepare_linear,
)
linear_gelu_op = define(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor",
    linear_gelu_reference,
    lambda x, weight, bias, act: accepts_layer(x, weight, bias, None),
    _launch_linear_gelu,
)
linear_backward_input_op = define(
    "linear_backward_input(Tensor dy, Tensor weight) -> Tensor",
    linear_backward_input_reference,
    _products.accepts,
    _launch_linear_backward_input,
)
linear_backward_weight_op = define(
    "linear_backward_weight(Tensor dy, Tensor x, bool bias, ScalarType dtype) -> (Tensor, Tensor)",
    linear_backward_weight_reference,
    lambda dy, x, bias, dtype: _products.accepts(dy, x) and dy.dtype == x.dtype and dtype in (x.dtype, torch.float32),
    _launch_linear_backward_weight,
)


def linear_backward(via, dy, x, weight, bias, wants):
    """The gradients of x, weight and bias; None where `wants` says that it is not wanted. dy: of x's type.

    x is read only for the gradient of the weight. via: see _parts.py.
    """
    wants_x, wants_weight, wants_bias = wants
    dx = via(linear_backward_input_op)(dy, weight) if wants_x else None
    dweight = dbias = None
    if wants_weight:
        dweight, dbias = via(linear_backward_weight_op)(dy, x, wants_bias, weight.dtype)
    elif wants_bias:
        dbias = as_rows(dy).sum(0, dtype=bias.dtype)
    return dx, dweight, dbias.to(bias.dtype) if wants_bias else None


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bias)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype


def _backward(ctx, dy):
    *wants, wants_residual = ctx.needs_input_grad[:4]
    dresidual = dy.to(ctx.residual_dtype) if wants_residual else None
    return *linear_backward(as_operator, dy.to(ctx.x_dtype), *ctx.saved_tensors, wants), dresidual, None


differentiable(linear_op, _backward, _setup_context)
differentiable_as(linear_gelu_op, linear_gelu_reference)
differentiable_as(linear_backward_input_op, linear_backward_input_reference)
differentiable_as(linear_backward_weight_op, linear_backward_weight_reference)


def check_layer(shape, dtype, weight, bias, residual=None):
    """Raises ValueError unless these are the operands of a linear layer for an x of this shape and dtype."""
    known = weight.dtype == dtype or (weight.dtype == torch.float32 and dtype in HALVES)
    if weight.dim() != 2 or not shape or shape[-1] != weight.shape[1] or not known:
        raise ValueError(
            f"x is {dtype} {list(shape)}, weight {weight.dtype} {list(weight.shape)}:"
            " expected [..., K] and [M, K] of one type, or a float32 weight beside half-precision x"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}; expected [{weight.shape[0]}], one for each output")
    if residual is not None and residual.shape != (*shape[:-1], weight.shape[0]):
        raise ValueError(f"residual is {list(residual.shape)}; expected {[*shape[:-1], weight.shape[0]]}")


def with_rows(layer, x, *parameters, residual, act):
    """layer(...) for an x of more than three dimensions. The operators would take four dimensions for an image."""
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
    """act(x · weightᵀ + bias) + residual; precision and types: see the head of this file.

    x: [..., K]; weight: [M, K]; bias: [M]; residual: [..., M]; act: "none", "gelu" or "gelu_tanh". Returns [..., M],
    contiguous, in the promoted type of x and residual. Raises ValueError on other activations, on shapes that do not
    fit, and unless the weight has the type of x, or is float32 beside half-precision x.
    """
    if act != "none" and act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}; expected one of {('none', *ACTIVATIONS)}")
    check_layer(x.shape, x.dtype, weight, bias, residual)
    if x.dim() > 3:
        return with_rows(linear, x, weight, bias, residual=residual, act=act)
    if act == "none":
        return linear_op(x, weight, bias, residual, torch.is_grad_enabled())
    if wants_gradient(x, weight, bias):
        y = F.gelu(linear_op(x, weight, bias, None, True), approximate=ACTIVATIONS[act])
    else:
        y = linear_gelu_op(x, weight, bias, act)
    return y if residual is None else y + residual
