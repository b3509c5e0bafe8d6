"""What the two halves of a transformer block, `norm_attention` and `norm_mlp`, share: layer norm and two linear layers.

    s = x + gate · branch, or x;    y = norm(s) · scale + shift
    out = out_layer(core(in_layer(y)))   [+ s]

A half is described once, by a subclass of `Half`: its inputs, its forward and its backward over `via`, see _parts.py.
The operator, its gradient and the references of both are made from this description. Calling these operators one by one
from Python takes longer than a small batch takes to compute. Beside the description there is therefore, on Hopper, one
call of the CUDA extension for all of a half's forward, and one for the backward from out to y. They are used once the
products have plans, see _products.py, and compute the same bits as the description over kernels.

A float32 weight beside half-precision activations is allowed for training: it is rounded for the products, and its
gradient is float32. In inference the weights should come in `dtype` and aligned to 16 bytes. With a weight or bias that
is not aligned, the half is computed by its parts, which then fall back to PyTorch.
"""

from functools import partial
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import _products
from ._library import (
    KERNEL_DTYPES,
    Operator,
    define,
    differentiable,
    differentiable_as,
    halves_on_hopper,
)
from ._parts import as_kernel, as_reference
from .layer_norm import cuda_accepts, layer_norm_backward, layer_norm_op, sum_backward

INPUTS = {  # of both halves, in order; a half adds its own
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
    """The inputs of a half, in a named tuple with the methods below.

    kept: the named tuple that a forward returns after `out`. Its first two fields are `total`, which is s if there is a
    branch and else empty, and `y`. A subclass adds

        forward(via):                      out, *kept
        backward(via, dout, kept, wants):  the gradients of y, w_in, b_in, w_out and b_out
        fused_forward():                   as forward, by the CUDA extension; None where that is not possible
        fused_backward(dout, kept, wants): as backward, by the CUDA extension; None where that is not possible

    wants: the tuple of inputs again, with a bool for each: whether its gradient is wanted.
    """

    __slots__ = ()
    name: str
    kept: type[NamedTuple]

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

    def forward_plans(self, act):
        """The plans of both linear layers, with `act` after the first. None where a plan is missing, or where the CUDA
        extension takes another of the inputs not.
        """
        x, dtype, w_in, b_in, w_out, b_out = self.x, self.dtype, self.w_in, self.b_in, self.w_out, self.b_out
        if not (x.is_cuda and _products.available() and _are_aligned(w_in, b_in, w_out, b_out)):
            return None
        rows = x.shape[0] * x.shape[1]
        first = _products.found_layer(dtype, rows, w_in, _products.epilogue(act, b_in))
        second = _products.found_layer(
            dtype, rows, w_out, _products.epilogue("", b_out), x.dtype if self.residual else None
        )
        if not (first and second):
            return None
        takes_norm = cuda_accepts(x, self.scale, self.shift, self.eps, self.branch, self.gate, dtype)
        return (first, second) if takes_norm else None

    def backward_plans(self, dout, wants, sums_in, *read):
        """The plans of the gradients of both linear layers, each for its input and its weight. None where a plan is
        missing, where not all gradients are wanted, or where the CUDA extension does not take the kept tensors `read`.

        sums_in: whether the product for the gradient of w_in also sums that of b_in.
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


def _are_aligned(*tensors):
    """Whether the addresses of all that are not None are multiples of 16."""
    for tensor in tensors:  # a loop, since this runs before each half
        if tensor is not None and tensor.data_ptr() % 16:
            return False
    return True


def _schema(hints: dict[str, type]) -> str:
    return ", ".join(f"{SCHEMA_TYPES[hint]} {name}" for name, hint in hints.items())


def define_half(half: type[Half]) -> Operator:
    """Register the operator of a half, and its gradient, whose reference computes what was kept again.

    The operator returns out, *kept; dcae_fast::<name>_backward the gradients of all tensors among the inputs.
    """
    hints, kept_hints = (
        {name: get_type_hints(fields)[name] for name in fields._fields} for fields in (half, half.kept)
    )
    tensors, count = [name for name, hint in hints.items() if hint in (Tensor, Tensor | None)], len(hints)

    def accepts(x, scale, *_):
        return x.dtype in KERNEL_DTYPES and scale.dtype in KERNEL_DTYPES

    def launch(*args):
        given = half._make(args)
        return given.fused_forward() or given.forward(as_kernel)

    def backward(via, dout, dtotal, *args):
        given, kept, wants = half._make(args[:count]), half.kept._make(args[count:-1]), half._make(args[-1])
        if via is as_reference:
            kept = half.kept._make(given.forward(as_reference)[1:])
        fused = given.fused_backward(dout, kept, wants) if via is as_kernel else None
        dy, *of_layers = fused or given.backward(via, dout, kept, wants)
        found = *given.norm_backward(via, dy, dout, dtotal, kept.total), *of_layers
        return tuple(dout.new_empty(0) if gradient is None else gradient for gradient in found)

    op = define(
        f"{half.name}({_schema(hints)}) -> ({', '.join(['Tensor'] * (1 + len(kept_hints)))})",
        lambda *args: half._make(args).forward(as_reference),
        accepts,
        launch,
    )
    backward_op = define(
        f"{half.name}_backward(Tensor dout, Tensor? dtotal, {_schema(hints | kept_hints)}, bool[] wants)"
        f" -> ({', '.join(['Tensor'] * len(tensors))})",
        partial(backward, as_reference),
        lambda dout, dtotal, *args: accepts(*args),
        partial(backward, as_kernel),
    )
    differentiable_as(backward_op, partial(backward, as_reference))
    differentiable(op, *_autograd(half, tensors, backward_op))
    return op


def _autograd(half, tensors, backward_op):
    """The backward of a half's operator and its setup_context. tensors: the inputs that have a gradient."""
    count = len(half._fields)

    def setup_context(ctx, inputs, output):
        inputs, kept = half._make(inputs), half.kept._make(output[1:])
        wants = half._make(ctx.needs_input_grad[:count])  # PyTorch may add an argument to those of an operator
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
