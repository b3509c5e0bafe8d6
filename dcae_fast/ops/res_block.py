"""A residual block of two 3×3 convolutions in training, as one operator.

    a = act(conv(x, w1) + b1),    y = norm(conv(a, w2)) + x

norm: "rms", `rms_norm` with weight `scale` and bias `shift`; "batch", `batch_norm_act` with the statistics of the
batch; or "none", which only adds `shift`, for a batch norm that was folded into w2. x, y: [B, C, H, W] channels-last;
w1: [M, C, 3, 3]; w2: [C, M, 3, 3]; b1: [M]; scale, shift: [C]. float32 parameters beside half-precision x are allowed:
the products round them, and their gradients are float32.

The gradients of x are convolutions, see conv2d_gradients.py. cuDNN computes what surrounds a convolution within it,
where that is the fastest:

    dz = act'(z) * conv(dc, flipped w2),    dx = conv(dz, flipped w1) + dy

z = conv(x, w1) is kept for SiLU; ReLU needs only a. If w1 has no gradient, x is not kept, and then the gradient has no
gradient.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ._elementwise import check_activation, check_filters
from ._library import KERNEL_DTYPES, as_channels_last, define, differentiable, differentiable_as, without_autocast
from ._parts import as_kernel, as_reference
from .batch_norm_act import batch_norm_act_backward_op, batch_norm_act_op
from .bias_act import bias_act_op
from .conv2d import conv2d_op
from .conv2d_gradients import (
    NO_NORM,
    PADDING,
    conv2d_act_backward_op,
    rounded_and_flipped,
    sum_to_channels_op,
    weight_gradient,
)
from .rms_norm import rms_norm_backward_op, rms_norm_op

NORMS = "rms", "batch", "none"


class Kept(NamedTuple):
    """What the gradient reads besides the inputs. Empty: what this block does not need."""

    z: Tensor
    a: Tensor
    c: Tensor
    mean: Tensor
    variance: Tensor
    flipped1: Tensor
    flipped2: Tensor


class ResBlock(NamedTuple):
    """The inputs of the operator, with methods that compute it. via: see _parts.py."""

    x: Tensor
    w1: Tensor
    b1: Tensor
    act: str
    w2: Tensor
    norm: str
    scale: Tensor | None
    shift: Tensor
    eps: float

    def forward(self, via):
        """y and `Kept`."""
        x, b1, act, scale, shift, eps = self.x, self.b1, self.act, self.scale, self.shift, self.eps
        w1, flipped1 = rounded_and_flipped(via, self.w1, x.dtype)
        w2, flipped2 = rounded_and_flipped(via, self.w2, x.dtype)
        z, c, mean, variance = (x.new_empty(0) for _ in range(4))
        if act == "silu":
            z = _conv(via, x, w1)
            a = via(bias_act_op)(z, b1, act, *NO_NORM, None, x.dtype)
        else:
            a = _conv(via, x, w1, b1.to(x.dtype), act)
        if self.norm == "none":
            y = _conv(via, a, w2, shift.to(x.dtype), residual=x)
        else:
            c = _conv(via, a, w2)
            if self.norm == "rms":
                y = via(rms_norm_op)(c, scale, shift, eps, "none", x, x.dtype)
            else:
                y, mean, variance = via(batch_norm_act_op)(c, scale, shift, eps, "none", x, x.dtype)
        return y, *Kept(z, a, c, mean, variance, flipped1, flipped2)

    def backward(self, via, dy, kept, wants):
        """The gradients of the tensors among the inputs; None where `wants` says that one is not wanted."""
        dx = dw1 = db1 = dw2 = dscale = dshift = None
        if self.norm == "rms":
            dc, dscale, dshift = via(rms_norm_backward_op)(dy, kept.c, self.scale, self.shift, self.eps, "none")
        elif self.norm == "batch":
            of_norm = self.scale, self.shift, kept.mean, kept.variance, self.eps, "none"
            dc, dscale, dshift = via(batch_norm_act_backward_op)(dy, kept.c, *of_norm)
        else:
            dc, dshift = dy, via(sum_to_channels_op)(dy, self.shift.dtype) if wants.shift else None
        if wants.w2:
            dw2 = weight_gradient(dc, kept.a, self.w2)
        if wants.x or wants.w1 or wants.b1:
            z, bias = (kept.z, self.b1) if self.act == "silu" else (kept.a, None)  # ReLU: a > 0 where z > 0
            dz, db1 = via(conv2d_act_backward_op)(dc, kept.flipped2, z, bias, self.act, wants.b1)
            del dc
            dw1 = weight_gradient(dz, self.x, self.w1) if wants.w1 else None
            dx = _conv(via, dz, kept.flipped1, residual=dy) if wants.x else None
            db1 = db1.to(self.b1.dtype)
        return dx, dw1, db1, dw2, dscale, dshift


def _conv(via, x, weight, bias=None, act="none", residual=None):
    return via(conv2d_op)(x, weight, bias, act, residual, 1, PADDING)


TENSORS = "x", "w1", "b1", "w2", "scale", "shift"
INPUTS = "Tensor w1, Tensor b1, str act, Tensor w2, str norm, Tensor? scale, Tensor shift, float eps"
KEPT = ", ".join(f"Tensor? {name}" for name in Kept._fields)


@without_autocast
def _forward(via, *args):
    return tuple(map(as_channels_last, ResBlock(*args).forward(via)))


@without_autocast
def _backward(via, dy, *args):
    given, kept, wants = ResBlock(*args[:9]), Kept(*args[9:-1]), ResBlock(*args[-1])
    if via is as_reference and torch.is_grad_enabled() and given.x is not None:  # the gradient of the gradient
        kept = Kept(*given.forward(as_reference)[1:])
    found = given.backward(via, dy, kept, wants)
    found = tuple(dy.new_empty(0) if gradient is None else gradient for gradient in found)
    return found if via is as_reference else tuple(map(as_channels_last, found))  # `define` does it for the reference


def _accepts(w1, b1, act, w2, norm, scale, shift, *_):
    return all(tensor is None or tensor.dtype in KERNEL_DTYPES for tensor in (w1, b1, w2, scale, shift))


res_block_op = define(
    f"res_block(Tensor x, {INPUTS}) -> ({', '.join(['Tensor'] * (1 + len(Kept._fields)))})",
    partial(_forward, as_reference),
    lambda x, *args: x.dtype in KERNEL_DTYPES and _accepts(*args),
    partial(_forward, as_kernel),
)
res_block_backward_op = define(
    f"res_block_backward(Tensor dy, Tensor? x, {INPUTS}, {KEPT}, bool[] wants)"
    f" -> ({', '.join(['Tensor'] * len(TENSORS))})",
    partial(_backward, as_reference),
    lambda dy, x, *args: dy.dtype in KERNEL_DTYPES and _accepts(*args),
    partial(_backward, as_kernel),
)


def _setup_context(ctx, inputs, output):
    given, kept, wants = ResBlock(*inputs), Kept(*output[1:]), ResBlock(*ctx.needs_input_grad[:9])
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    if not wants.w1:
        given = given._replace(x=None)
    if given.act == "silu" and not wants.w2:
        kept = kept._replace(a=None)
    ctx.constants = [None if isinstance(value, Tensor) else value for value in given]
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in given), *kept)


def _gradient(ctx, dy, *_):
    if dy is None:
        return (None,) * 9
    saved, wants = ctx.saved_tensors, ctx.needs_input_grad[:9]
    given = [c if t is None else t for t, c in zip(saved[:9], ctx.constants, strict=True)]
    if torch.is_grad_enabled() and given[0] is None:
        raise RuntimeError(
            "res_block with a frozen first weight keeps no input, so its gradient has no gradient. For second"
            " derivatives of a frozen autoencoder: dcae_fast.patch(model, disable='res_block')"
        )
    found = dict(zip(TENSORS, res_block_backward_op(dy, *given, *saved[9:], [*wants]), strict=True))
    return tuple(found[name] if wanted else None for name, wanted in zip(ResBlock._fields, wants, strict=True))


differentiable(res_block_op, _gradient, _setup_context)
differentiable_as(res_block_backward_op, partial(_backward, as_reference))


def res_block(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    act: str,
    w2: torch.Tensor,
    norm: str,
    scale: torch.Tensor | None,
    shift: torch.Tensor,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, variance); see the head of this file. mean and variance: of the batch for "batch", else empty.

    x: [B, C, H, W]; w1: [M, C, 3, 3]; b1: [M]; w2: [C, M, 3, 3]; scale, shift: [C]; act: "none", "relu" or "silu";
    norm: "rms", "batch" or "none", without scale. y is [B, C, H, W] channels-last, in the type of x. Raises ValueError
    on other shapes, activations or norms.
    """
    check_activation(act)
    if norm not in NORMS or (scale is None) != (norm == "none"):
        raise ValueError(f"norm={norm!r}; expected one of {NORMS}, with a scale unless it is 'none'")
    if x.dim() != 4 or w1.shape != (w1.shape[0], x.shape[1], 3, 3) or w2.shape != (x.shape[1], w1.shape[0], 3, 3):
        raise ValueError(
            f"x is {list(x.shape)}, w1 {list(w1.shape)}, w2 {list(w2.shape)}:"
            " expected [B, C, H, W], [M, C, 3, 3] and [C, M, 3, 3]"
        )
    check_filters(w1, b1=b1)
    check_filters(w2, scale=scale, shift=shift)
    y, _, _, _, mean, variance, *_ = res_block_op(x, w1, b1, act, w2, norm, scale, shift, eps)
    return y, mean, variance
