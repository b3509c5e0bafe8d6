"""The halves of a transformer's block: attention or MLP, with the layer norm before it, as one operator each.

    s = x + gate · branch, or x;    y = norm(s) · scale + shift
    norm_attention:    out = attention(y · w_qkvᵀ + b_qkv) · w_projᵀ + b_proj   [+ s]
    norm_mlp:          out = gelu(y · w1ᵀ + b1) · w2ᵀ + b2                      [+ s]

They run the kernels of `layer_norm`, `linear`, `packed_attention` and `mlp`, with the forms, types and exactness of
these, and keep for the gradient what these keep. As operators with a gradient each, those take longer to call from
Python than a small batch takes to compute; on Hopper the CUDA extension runs a half in one call, as soon as its
products have plans.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from . import _products
from ._library import (
    KERNEL_DTYPES,
    Operator,
    cuda_extension,
    define,
    differentiable,
    differentiable_as,
    halves_on_hopper,
)
from .layer_norm import (
    check_norm,
    cuda_accepts,
    gradients_of_terms,
    layer_norm_backward_op,
    layer_norm_backward_reference,
    layer_norm_op,
    layer_norm_reference,
    norm_gradients,
)
from .linear import (
    Gradients,
    check_layer,
    input_gradient,
    linear_gelu_op,
    linear_gelu_reference,
    linear_input_gradient_reference,
    linear_op,
    linear_reference,
    linear_weight_gradient_reference,
    wants_gradient,
    weight_gradient,
)
from .mlp import check_activation, gelu_gradient, gelu_gradient_reference, mlp_gradients, mlp_op, mlp_reference
from .packed_attention import (
    attention_backward_op,
    attention_op,
    fits,
    packed_attention_backward_reference,
    packed_attention_reference,
)


@dataclass(frozen=True)
class Parts:
    """What the halves are made of."""

    layer_norm: Callable
    layer_norm_backward: Callable
    linear: Callable
    linear_gelu: Callable
    mlp: Callable
    attention: Callable
    attention_backward: Callable
    gelu_gradient: Callable
    products: Gradients


KERNELS = Parts(
    layer_norm_op.dense_kernel,
    layer_norm_backward_op.dense_kernel,
    linear_op.dense_kernel,
    linear_gelu_op.dense_kernel,
    mlp_op.dense_kernel,
    attention_op.dense_kernel,
    attention_backward_op.dense_kernel,
    gelu_gradient.dense_kernel,
    Gradients(input_gradient.dense_kernel, weight_gradient.dense_kernel),
)
REFERENCES = Parts(
    layer_norm_reference,
    layer_norm_backward_reference,
    linear_reference,
    linear_gelu_reference,
    mlp_reference,
    packed_attention_reference,
    packed_attention_backward_reference,
    gelu_gradient_reference,
    Gradients(linear_input_gradient_reference, linear_weight_gradient_reference),
)


def _norm(parts, x, scale, shift, eps, branch, gate, dtype):
    """s; s again if there is a branch, else nothing; and y."""
    total, y = parts.layer_norm(x, scale, shift, eps, branch, gate, dtype)
    return x if branch is None else total, total, y


def _attention(parts, x, scale, shift, eps, branch, gate, dtype, w_qkv, b_qkv, w_proj, b_proj, num_heads, residual):
    """out, s if there is a branch, and what is kept for the gradient."""
    s, total, y = _norm(parts, x, scale, shift, eps, branch, gate, dtype)
    qkv = parts.linear(y, w_qkv, b_qkv, None)
    attended, lse = parts.attention(qkv, num_heads)
    return parts.linear(attended, w_proj, b_proj, s if residual else None), total, y, qkv, attended, lse


def _mlp(parts, x, scale, shift, eps, branch, gate, dtype, w1, b1, w2, b2, act, residual, trains):
    """The same of the other half; without `trains` nothing is kept."""
    s, total, y = _norm(parts, x, scale, shift, eps, branch, gate, dtype)
    added = s if residual else None
    if trains:
        out, h = parts.mlp(y, w1, b1, w2, b2, added, act)
        return out, total, y, h
    return parts.linear(parts.linear_gelu(y, w1, b1, act), w2, b2, added), total, y.new_empty(0), y.new_empty(0)


def _found_forward_plans(of_norm, w1, b1, w2, b2, act, residual):
    """What products have for both layers, act following the first; None without one of these plans, or if the CUDA
    extension does not take the norm.
    """
    if not (of_norm[0].is_cuda and _products.available()):
        return None
    x, *_, dtype = of_norm
    rows = x.shape[0] * x.shape[1]
    first = _products.found_layer(dtype, rows, w1, _products.epilogue(act, b1))
    second = _products.found_layer(dtype, rows, w2, _products.epilogue("", b2), x.dtype if residual else None)
    return (first, second) if first and second and cuda_accepts(*of_norm) else None


def _launch_attention(*args):
    *of_norm, w_qkv, b_qkv, w_proj, b_proj, num_heads, residual = args
    plans = _found_forward_plans(of_norm, w_qkv, b_qkv, w_proj, b_proj, "", residual)
    if plans and fits(of_norm[-1], of_norm[0].shape[1], w_qkv.shape[0] // (3 * num_heads)):
        return cuda_extension().norm_attention(*args, *plans)
    return _attention(KERNELS, *args)


def _launch_mlp(*args):
    *of_norm, w1, b1, w2, b2, _, residual, trains = args
    plans = _found_forward_plans(of_norm, w1, b1, w2, b2, "gelu_aux" if trains else "gelu", residual)
    if plans:
        return cuda_extension().norm_mlp(*of_norm, w1, b1, w2, b2, residual, *plans)
    return _mlp(KERNELS, *args)


def _found_gradient_plans(parts, dout, kept, w1, b1, w2, b2, first_sums, wants):
    """The same for the gradients of both layers, of x and of the weight each, where parts are kernels.

    kept: tensors that the CUDA extension reads. first_sums: whether the first bias has its gradient from a product.
    """
    parameters = zip(wants, (w1, b1, w2, b2), strict=True)
    all_wanted = all(wanted or parameter is None for wanted, parameter in parameters)
    is_for_kernels = parts is KERNELS and dout.is_cuda and _products.available()
    if not (is_for_kernels and all_wanted and halves_on_hopper(*kept)):
        return None
    dtype, rows = kept[0].dtype, dout.shape[0] * dout.shape[1]
    first = _products.found_gradients(dtype, rows, w1, first_sums)
    plans = *first, *_products.found_gradients(dtype, rows, w2, b2 is not None)
    return plans if all(plans) else None


def _attention_gradients(parts, dout, dtotal, inputs, kept, wants):
    *of_norm, w_qkv, b_qkv, w_proj, b_proj, num_heads, residual = inputs
    total, y, qkv, attended, lse = kept
    layers = w_qkv, b_qkv, w_proj, b_proj
    plans = _found_gradient_plans(parts, dout, (y, qkv, attended), *layers, b_qkv is not None, wants[-4:])
    if plans and fits(qkv.dtype, qkv.shape[1], attended.shape[2] // num_heads):
        operands = dout, y, qkv, attended, lse, *layers, num_heads
        dy, *of_layers = cuda_extension().norm_attention_backward(*operands, *plans)
    else:
        *_, wants_w_qkv, wants_b_qkv, wants_w_proj, wants_b_proj = wants
        proj = w_proj, b_proj, True, wants_w_proj, wants_b_proj
        dattended, *of_proj = parts.products.of_layer(dout.to(attended.dtype), attended, *proj)
        dqkv = parts.attention_backward(dattended, qkv, attended, lse, num_heads)
        dy, *of_qkv = parts.products.of_layer(dqkv, y, w_qkv, b_qkv, True, wants_w_qkv, wants_b_qkv)
        of_layers = *of_qkv, *of_proj
    return *_norm_gradients(parts, dy, dout if residual else None, dtotal, of_norm, total), *of_layers


def _mlp_gradients(parts, dout, dtotal, inputs, kept, wants):
    *of_norm, w1, b1, w2, b2, act, residual, _ = inputs
    total, y, h = kept
    layers = w1, b1, w2, b2
    plans = _found_gradient_plans(parts, dout, (y, h), *layers, False, wants[-4:])
    if plans:
        dy, *of_layers = cuda_extension().norm_mlp_backward(dout, y, h, *layers, act, *plans)
    else:
        operands = dout.to(h.dtype), y, *layers, h, act, (True, *wants[-4:])
        dy, *of_layers = mlp_gradients(parts.products, parts.gelu_gradient, *operands)
    return *_norm_gradients(parts, dy, dout if residual else None, dtotal, of_norm, total), *of_layers


def _norm_gradients(parts, dy, dresidual, dtotal, of_norm, total):
    x, scale, shift, eps, branch, gate, _ = of_norm
    sums = [gradient for gradient in (dresidual, dtotal) if gradient is not None]
    dsum = sums[0] + sums[1] if len(sums) == 2 else next(iter(sums), None)
    s = x if branch is None else total
    return norm_gradients(parts.layer_norm_backward, dy, dsum, s, scale, shift.dtype, branch, gate, eps, x.dtype)


NORM = "Tensor x, Tensor scale, Tensor shift, float eps, Tensor? branch, Tensor? gate, ScalarType dtype"
DIFFERENTIABLE = (0, 1, 2, 4, 5, 7, 8, 9, 10)  # places of x, scale, shift, branch, gate, and two layers' parameters
X, BRANCH, GATE, FIRST_WEIGHT, LAST_WEIGHT = 0, 4, 5, 7, 9


norm_attention_reference = partial(_attention, REFERENCES)
norm_mlp_reference = partial(_mlp, REFERENCES)


def _define_half(
    name: str, layers: str, forward: Callable, launch: Callable, gradients: Callable, kept: int
) -> Operator:
    """Register a half that keeps so many tensors, and its gradient, whose reference computes them again."""
    inputs = f"{NORM}, {layers}"
    count = len(inputs.split(","))

    def accepts(x, scale, *_):
        return x.dtype in KERNEL_DTYPES and scale.dtype in KERNEL_DTYPES

    def backward(parts, dout, dtotal, *args):
        given, tensors, wants = args[:count], args[count:-1], args[-1]
        tensors = forward(parts, *given)[1:] if parts is REFERENCES else tensors
        found = gradients(parts, dout, dtotal, given, tensors, wants)
        return tuple(dout.new_empty(0) if gradient is None else gradient for gradient in found)

    half = define(
        f"{name}({inputs}) -> ({', '.join(['Tensor'] * (1 + kept))})",
        partial(forward, REFERENCES),
        accepts,
        launch,
    )
    tensors = ", ".join(f"Tensor? kept{place}" for place in range(kept))
    backward_op = define(
        f"{name}_backward(Tensor dout, Tensor? dtotal, {inputs}, {tensors}, bool[] wants)"
        f" -> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
        partial(backward, REFERENCES),
        lambda dout, dtotal, *args: accepts(*args),
        partial(backward, KERNELS),
    )

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        _, total, y, *others = output
        y = y if ctx.needs_input_grad[FIRST_WEIGHT] else None  # nothing else reads it
        ctx.terms = None
        if inputs[BRANCH] is not None and not ctx.needs_input_grad[GATE]:  # s takes the place of x and branch
            ctx.terms = inputs[X].dtype, inputs[BRANCH].dtype
            inputs = (total, *inputs[1:BRANCH], None, *inputs[GATE:])
        ctx.constants = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        given = (value if isinstance(value, torch.Tensor) else None for value in inputs)
        ctx.save_for_backward(*given, total, y, *others)

    def gradient(ctx, dout, dtotal, *_):
        tensors, wants = ctx.saved_tensors, ctx.needs_input_grad
        given = [c if t is None else t for t, c in zip(tensors[:count], ctx.constants, strict=True)]
        gate = given[GATE]
        if ctx.terms is not None:
            given[GATE] = None
        if dout is None:
            dout = given[0].new_zeros(*given[0].shape[:2], given[LAST_WEIGHT].shape[0])
        found = backward_op(dout, dtotal, *given, *tensors[count:], [wants[place] for place in DIFFERENTIABLE])
        found = dict(zip(DIFFERENTIABLE, found, strict=True))
        if ctx.terms is not None:
            found[X], found[BRANCH] = gradients_of_terms(found[X], gate, *ctx.terms)
        return tuple(found[place] if wanted else None for place, wanted in enumerate(wants))

    differentiable(half, gradient, setup_context)
    differentiable_as(backward_op, partial(backward, REFERENCES))
    return half


_norm_attention = _define_half(
    "norm_attention",
    "Tensor w_qkv, Tensor? b_qkv, Tensor w_proj, Tensor? b_proj, int num_heads, bool residual",
    _attention,
    _launch_attention,
    _attention_gradients,
    kept=5,
)
_norm_mlp = _define_half(
    "norm_mlp",
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str act, bool residual, bool trains",
    _mlp,
    _launch_mlp,
    _mlp_gradients,
    kept=3,
)


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
    """(s, out) of the half with attention; see the head of this file.

    x, branch: [B, N, D]; scale, shift: [D] or [B, D]; gate: [B, D]; w_qkv: [3 * M, D], w_proj: [D, M]. dtype: of y and
    of what is computed from it, by default that of x. residual: adds s to out. Meant for as few tokens as
    `is_for_few_tokens` allows. Raises ValueError on shapes that do not fit.
    """
    dtype = dtype or x.dtype
    check_norm(x, scale, shift, branch, gate)
    check_layer(x.shape, dtype, w_qkv, b_qkv)
    if num_heads < 1 or w_qkv.shape[0] % (3 * num_heads):
        raise ValueError(f"w_qkv is {list(w_qkv.shape)}, num_heads {num_heads}: expected 3 * num_heads * D rows")
    check_layer((*x.shape[:2], w_qkv.shape[0] // 3), dtype, w_proj, b_proj, x if residual else None)
    layers = w_qkv, b_qkv, w_proj, b_proj, num_heads, residual
    out, total, *_ = _norm_attention(x, scale, shift, eps, branch, gate, dtype, *layers)
    return x if branch is None else total, out


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
    """(s, out) of the half with the MLP; see the head of this file.

    w1: [H, D], w2: [D, H]; act: "gelu" or "gelu_tanh"; the rest as of `norm_attention`. Raises ValueError on other
    activations and shapes that do not fit.
    """
    dtype = dtype or x.dtype
    check_norm(x, scale, shift, branch, gate)
    check_activation(act)
    check_layer(x.shape, dtype, w1, b1)
    check_layer((*x.shape[:2], w1.shape[0]), dtype, w2, b2, x if residual else None)
    trains = wants_gradient(x, scale, shift, branch, gate, w1, b1, w2, b2)
    out, total, *_ = _norm_mlp(x, scale, shift, eps, branch, gate, dtype, w1, b1, w2, b2, act, residual, trains)
    return x if branch is None else total, out
