"""The common part of `norm_attention` and `norm_mlp`, the two halves of a transformer block.

    s = x + gate · branch, or x;    y = norm(s) · scale + shift
    out = core(y · w_inᵀ + b_in) · w_outᵀ + b_out   [+ s]

A subclass of `Half` describes a half once: its inputs, its forward and its backward over `via`, see _parts.py. The
operator, its gradient and the references of both are made from this description.

Calls of all these operators from Python take longer than a small batch takes to compute. On Hopper one call of the CUDA
extension therefore computes the forward of a half, and another one the backward from out to y. These fused calls give
the same bits as the description over kernels. They are used as soon as the products have plans, see _products.py.

A float32 weight beside half-precision activations is rounded for the products, and its gradient is float32. In
inference, inside autocast, the rounded weights are kept, see linear.py. Weights and biases should be aligned to 16
bytes. If one is not aligned, the operators compute the half one after the other, and PyTorch computes the product with
that weight.
"""

from functools import partial
from typing import get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _plans, _products
from ._library import (
    KERNEL_DTYPES,
    Operator,
    cuda_extension,
    define,
    differentiable,
    differentiable_as,
    halves_on_hopper,
)
from ._parts import as_kernel, as_reference
from .layer_norm import cuda_accepts, layer_norm_backward, layer_norm_op, sum_backward

INPUTS = {  # of both halves, in the order of the operators' schemas; a half adds further inputs
    "x": Tensor,
    "scale": Tensor,
    "shift": Tensor,
    "eps": float,
    "branch": Tensor | None,
    "gate": Tensor | None,
    "dtype": torch.dtype,
    "w_in": Tensor,
    "b_in": Tensor | None,
    "w_out": Tensor,
    "b_out": Tensor | None,
    "residual": bool,
}
SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    torch.dtype: "ScalarType",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
}


class Half:
    """A half: the named tuple of its operator's inputs, with methods that compute it. A subclass defines

        forward(via):                      out, *kept
        backward(via, dout, kept, wants):  the gradients of y, w_in, b_in, w_out and b_out
        activation():                      the activation of the first linear layer, "" for none
        fuses():                           whether shapes fit the CUDA extension
        fused_forward():                   the result of forward by the CUDA extension, or None
        fused_backward(dout, kept, wants): the result of backward by the CUDA extension, or None

    name: of the operator. Kept: a named tuple type, the tensors kept for the backward pass. The first two are total,
    which is s, or empty without a branch, and y. wants: a bool for each input: whether its gradient is wanted.
    differentiable_twice: whether the gradient has a gradient.
    """

    __slots__ = ()
    name: str
    Kept: type[tuple]
    differentiable_twice = True

    def activation(self):
        return ""

    def fuses(self):
        """Whether one call of the CUDA extension computes the forward, if it takes the inputs and has plans."""
        return True

    def fused_forward(self):
        return None

    def fused_backward(self, dout, kept, wants):
        return None

    def norm(self, via):
        """s, total and y."""
        x, branch = self.x, self.branch
        total, y = via(layer_norm_op)(x, self.scale, self.shift, self.eps, branch, self.gate, self.dtype)
        return x if branch is None else total, total, y

    def norm_backward(self, via, dy, dout, dtotal, total):
        """The gradients of x, scale, shift, branch and gate."""
        dsum = dtotal
        if self.residual:
            dsum = dout if dtotal is None else dout + dtotal
        s, of_branch = self.x if self.branch is None else total, (self.branch, self.gate)
        return layer_norm_backward(via, dy, dsum, s, self.scale, self.shift.dtype, *of_branch, self.eps, self.x.dtype)

    def forward_keys(self):
        """The keys of the plans of both linear layers, see _plans.py. None if the CUDA extension does not take the
        inputs.
        """
        x, dtype, w_in, b_in, w_out, b_out = self.x, self.dtype, self.w_in, self.b_in, self.w_out, self.b_out
        if not (x.is_cuda and _products.available() and _are_aligned(w_in, b_in, w_out, b_out)):
            return None
        if not cuda_accepts(x, self.scale, self.shift, self.eps, self.branch, self.gate, dtype):
            return None
        rows, sum_dtype = x.shape[0] * x.shape[1], x.dtype if self.residual else None
        return (
            _products.key_of_layer(dtype, rows, w_in, _products.epilogue(self.activation(), b_in)),
            _products.key_of_layer(dtype, rows, w_out, _products.epilogue("", b_out), sum_dtype),
        )

    def forward_plans(self):
        """The plans of both linear layers. None if one is missing or the CUDA extension does not take the inputs."""
        keys = self.forward_keys()
        return None if keys is None else _found_all(keys)

    def backward_plans(self, dout, wants, sums_in, *read):
        """The plans for the gradients of both linear layers: of the input and the weight of the first one, then of the
        second one. None if a plan is missing, if a gradient of a layer's parameter is not wanted, or if the CUDA
        extension does not take dout, a weight, or the kept tensors `read`.

        sums_in: whether the product for the gradient of w_in also sums over rows, for the gradient of b_in.
        """
        w_in, w_out = self.w_in, self.w_out
        all_wanted = wants.w_in and wants.w_out and (wants.b_in or self.b_in is None)
        all_wanted = all_wanted and (wants.b_out or self.b_out is None)
        if not (all_wanted and dout.is_cuda and _products.available()):
            return None
        if not (_are_aligned(dout, w_in, w_out) and halves_on_hopper(*read)):
            return None
        dtype, rows = self.dtype, dout.shape[0] * dout.shape[1]
        of_w_in = _products.found_gradients(dtype, rows, w_in, sums_in)
        of_w_out = _products.found_gradients(dtype, rows, w_out, self.b_out is not None)
        plans = of_w_in + of_w_out
        return plans if all(plans) else None


def _found_all(keys):
    """The plans for all keys, None if one is missing."""
    plans = tuple(map(_plans.found, keys))
    return plans if all(plans) else None


def _are_aligned(*tensors):
    """Whether the addresses of all tensors that are not None are multiples of 16 bytes."""
    for tensor in tensors:  # a loop is faster than a generator, and this runs in every call
        if tensor is not None and tensor.data_ptr() % 16:
            return False
    return True


def _schema(hints: dict[str, type]) -> str:
    return ", ".join(f"{SCHEMA_TYPES[hint]} {name}" for name, hint in hints.items())


def define_half(half: type[Half]) -> Operator:
    """Register the operator of a half and its gradient.

    dcae_fast::<name> returns out, *kept. dcae_fast::<name>_backward returns the gradients of all tensors among the
    inputs; its reference computes the kept tensors again, so that it can be differentiated.
    """
    hints, kept_hints = (
        {name: get_type_hints(fields)[name] for name in fields._fields} for fields in (half, half.Kept)
    )
    tensors, count = [name for name, hint in hints.items() if hint in (Tensor, Tensor | None)], len(hints)

    def accepts(x, scale, *_):
        return x.dtype in KERNEL_DTYPES and scale.dtype in KERNEL_DTYPES

    def launch(*args):
        given = half._make(args)
        return given.fused_forward() or given.forward(as_kernel)

    def prepare(*args):
        """One call of the CUDA extension, if it takes the arguments, as soon as both products have plans."""
        given = half._make(args)
        keys = given.forward_keys() if given.fuses() else None
        if keys is None:
            return None

        def run(*args):
            plans = _found_all(keys)
            if plans is None:
                return half._make(args).forward(as_kernel)
            return getattr(cuda_extension(), half.name)(*args, *plans)

        return run

    def backward(via, dout, dtotal, *args):
        given, kept, wants = half._make(args[:count]), half.Kept._make(args[count:-1]), half._make(args[-1])
        if via is as_reference:
            kept = half.Kept._make(given.forward(as_reference)[1:])
        fused = given.fused_backward(dout, kept, wants) if via is as_kernel else None
        dy, *of_layers = fused or given.backward(via, dout, kept, wants)
        found = *given.norm_backward(via, dy, dout, dtotal, kept.total), *of_layers
        return tuple(dout.new_empty(0) if gradient is None else gradient for gradient in found)

    op = define(
        f"{half.name}({_schema(hints)}) -> ({', '.join(['Tensor'] * (1 + len(kept_hints)))})",
        lambda *args: half._make(args).forward(as_reference),
        accepts,
        launch,
        prepare=prepare,
    )
    backward_op = define(
        f"{half.name}_backward(Tensor dout, Tensor? dtotal, {_schema(hints | kept_hints)}, bool[] wants)"
        f" -> ({', '.join(['Tensor'] * len(tensors))})",
        partial(backward, as_reference),
        lambda dout, dtotal, *args: accepts(*args),
        partial(backward, as_kernel),
    )
    gradient, setup_context = _autograd(half, tensors, backward_op)
    if half.differentiable_twice:
        differentiable_as(backward_op, partial(backward, as_reference))
    else:
        gradient = once_differentiable(gradient)
    differentiable(op, gradient, setup_context)
    return op


def _autograd(half, tensors, backward_op):
    """backward and setup_context, as `differentiable` takes them. tensors: names of the inputs that are tensors."""
    count = len(half._fields)

    def setup_context(ctx, inputs, output):
        inputs, kept = half._make(inputs), half.Kept._make(output[1:])
        wants = half._make(ctx.needs_input_grad[:count])  # PyTorch may append an argument
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        if not wants.w_in:  # only the gradient of w_in reads y
            kept = kept._replace(y=None)
        ctx.terms = None
        if inputs.branch is not None and not wants.gate:  # s takes the place of x and branch
            ctx.terms = inputs.x.dtype, inputs.branch.dtype
            inputs = inputs._replace(x=kept.total, branch=None)
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs), *kept)

    def backward(ctx, dout, dtotal, *_):
        saved, wants = ctx.saved_tensors, ctx.needs_input_grad
        given = half._make([c if t is None else t for t, c in zip(saved[:count], ctx.constants, strict=True)])
        gate = given.gate
        if ctx.terms is not None:
            given = given._replace(gate=None)
        if dout is None:
            dout = given.x.new_zeros(*given.x.shape[:2], given.w_out.shape[0])
        found = dict(zip(tensors, backward_op(dout, dtotal, *given, *saved[count:], [*wants]), strict=True))
        if ctx.terms is not None:
            found["x"], found["branch"] = sum_backward(found["x"], gate, *ctx.terms)
        return tuple(found[name] if wanted else None for name, wanted in zip(half._fields, wants, strict=True))

    return backward, setup_context
