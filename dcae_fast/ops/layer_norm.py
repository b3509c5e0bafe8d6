"""Layer norm of a stream of tokens, to which a gated branch may be added first.

    s = x + gate · branch,    y = norm(s) · scale + shift,    norm(s) = (s - mean_d(s)) * rsqrt(var_d(s) + eps)

x, branch, s, y: [B, N, D]; gate: [B, D]. scale and shift are [D], or [B, D], one vector for each image, as in adaLN;
with [B, D] the factor is 1 + scale. Statistics in fp32. s has the promoted type of x, branch and gate; y has `dtype`.
Source: U-ViT (arXiv 2209.12152), DiT (arXiv 2212.09748).

The backward pass adds the gradient of s, which the rest of the block uses too, to the gradient of the norm in one pass.
"""

import torch
import torch.nn.functional as F

from ._library import (
    HALVES,
    KERNEL_DTYPES,
    are_aligned,
    as_x_or_float32,
    define,
    differentiable_as,
    halves_on_hopper,
    is_hopper,
)
from ._parts import as_operator

MOST_CHANNELS = 8192
CUDA_MOST_CHANNELS = 2048
CUDA_BACKWARD_WIDTHS = (512, 1152)  # UViT-S; UViT-H and DiT-XL, whose width Triton pads to 2048


def layer_norm_reference(x, scale, shift, eps, branch, gate, dtype):
    total = x if branch is None else x + gate[:, None] * branch
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    scale, shift = (scale, shift) if scale.dim() == 1 else (1 + scale[:, None], shift[:, None])
    y = (F.layer_norm(wide, wide.shape[2:], eps=eps) * scale + shift).to(dtype)
    return total.new_empty(0) if branch is None else total, y


def layer_norm_backward_reference(dy, dsum, total, scale, branch, gate, eps, dtype):
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    rstd = torch.rsqrt(wide.var(2, correction=0, keepdim=True) + eps)
    dy, x_hat = dy.to(wide.dtype), (wide - wide.mean(2, keepdim=True)) * rstd
    dx_hat = dy * (scale if scale.dim() == 1 else 1 + scale[:, None])
    along, across = (dx_hat * x_hat).mean(2, keepdim=True), dx_hat.mean(2, keepdim=True)
    dx = (dx_hat - across - x_hat * along) * rstd
    dx = dx if dsum is None else dx + dsum
    dims = (0, 1) if scale.dim() == 1 else 1
    dscale, dshift = (dy * x_hat).sum(dims).to(scale.dtype), dy.sum(dims).to(scale.dtype)
    if branch is None:
        return dx.to(dtype), dscale, dshift, total.new_empty(0), total.new_empty(0)
    return dx.to(dtype), dscale, dshift, (dx * gate[:, None]).to(branch.dtype), (dx * branch).sum(1).to(gate.dtype)


def _accepts(x, scale, *_):
    return x.dtype in KERNEL_DTYPES and scale.dtype in KERNEL_DTYPES and x.shape[2] <= MOST_CHANNELS


def cuda_accepts(x, scale, shift, eps, branch, gate, dtype):
    width, parameters = x.shape[2], (scale, shift)
    halves = () if branch is None else (branch, gate)
    if scale.dim() == 2:
        parameters, halves = (), (*halves, *parameters)
    return (
        dtype in HALVES
        and width % 8 == 0
        and 0 < width <= CUDA_MOST_CHANNELS
        and scale.dtype == shift.dtype
        and are_aligned((x, *parameters), dtype, torch.float32)
        and are_aligned(halves, dtype)
        and is_hopper(x.device)
    )


def _cuda_accepts_backward(dy, dsum, total, scale, branch, gate, eps, dtype):
    tokens = [total] if dsum is None else [total, dsum]
    halves = [dy] if branch is None else [dy, branch, gate]
    if scale.dim() == 2:
        halves.append(scale)
    return (
        total.shape[2] in CUDA_BACKWARD_WIDTHS
        and total.numel() > 0
        and all(tensor.dtype == dtype for tensor in tokens)
        and as_x_or_float32(dy, scale, *tokens)
        and halves_on_hopper(*halves)
    )


layer_norm_op = define(
    "layer_norm(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? branch, Tensor? gate, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    layer_norm_reference,
    _accepts,
    "layer_norm",
    cuda_accepts,
)
layer_norm_backward_op = define(
    "layer_norm_backward(Tensor dy, Tensor? dsum, Tensor total, Tensor scale, Tensor? branch, Tensor? gate,"
    " float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    layer_norm_backward_reference,
    lambda dy, dsum, *args: _accepts(*args),
    "layer_norm",
    _cuda_accepts_backward,
)
differentiable_as(layer_norm_op, layer_norm_reference)
differentiable_as(layer_norm_backward_op, layer_norm_backward_reference)


def layer_norm_backward(via, dy, dsum, total, scale, shift_dtype, branch, gate, eps, dtype):
    """The gradients of x, scale, shift, branch and gate; the last two are None without a branch.

    dy, dsum: the gradients of y and s, dsum None if s has none; total: s; dtype: of x. via: see _parts.py.
    """
    dx, dscale, dshift, *rest = via(layer_norm_backward_op)(dy, dsum, total, scale, branch, gate, eps, dtype)
    return dx, dscale, dshift.to(shift_dtype), *((None, None) if branch is None else rest)


def sum_backward(dsum, gate, x_dtype, branch_dtype):
    """The gradients of x and branch, from the gradient of x + gate · branch. Needs neither x nor branch."""
    return dsum.to(x_dtype), (dsum * gate[:, None]).to(branch_dtype)


class _LayerNorm(torch.autograd.Function):
    """(s, y). Without a branch s is x itself, so that the backward pass receives all of the gradient of s."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps, branch, gate, dtype):
        total, y = layer_norm_op(x, scale, shift, eps, branch, gate, dtype)
        total = x if branch is None else total
        ctx.save_for_backward(total, scale, branch if ctx.needs_input_grad[5] else None, gate)
        ctx.eps, ctx.dtypes = eps, (x.dtype, shift.dtype, None if branch is None else branch.dtype)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx, dsum, dy):
        total, scale, branch, gate = ctx.saved_tensors
        x_dtype, shift_dtype, branch_dtype = ctx.dtypes
        summed = branch is None and gate is not None
        dy = torch.zeros_like(total) if dy is None else dy
        terms = (None, None, ctx.eps, total.dtype) if summed else (branch, gate, ctx.eps, x_dtype)
        dx, dscale, dshift, dbranch, dgate = layer_norm_backward(
            as_operator, dy, dsum, total, scale, shift_dtype, *terms
        )
        if summed:
            dx, dbranch = sum_backward(dx, gate, x_dtype, branch_dtype)
        return dx, dscale, dshift, None, dbranch, dgate, None


def check_norm(x, scale, shift, branch, gate):
    """Raises ValueError on shapes that do not fit."""
    image = (x.shape[0], x.shape[2]) if x.dim() == 3 else ()
    of_scale = image if scale.dim() == 2 else x.shape[2:]  # by the dimension, since torch.export would compare B with D
    fits = x.dim() == 3 and scale.shape == shift.shape == of_scale
    if not fits or (branch is None) != (gate is None):
        raise ValueError(
            f"x {list(x.shape)}, scale {list(scale.shape)}, shift {list(shift.shape)}: expected [B, N, D], and [D] or"
            " [B, D] twice; branch and gate: both or neither"
        )
    if branch is not None and not (branch.shape == x.shape and gate.shape == scale.shape == image):
        raise ValueError(
            f"branch {list(branch.shape)}, gate {list(gate.shape)}, scale {list(scale.shape)}: expected"
            f" {list(x.shape)}, and {list(image)} twice"
        )


def layer_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, y): s = x + gate · branch and y = norm(s) · scale + shift; see the head of this file.

    x, branch: [B, N, D]; scale, shift: both [D] or both [B, D]; gate: [B, D], allowed only with a scale of [B, D].
    dtype: of y, by default the type of x. Without branch and gate s is x. The caller must use the returned s, not x,
    in the rest of the block, so that the gradient takes one pass. Raises ValueError on shapes that do not fit, and
    unless branch and gate come together.
    """
    check_norm(x, scale, shift, branch, gate)
    dtype = dtype or x.dtype
    tensors = [tensor for tensor in (x, scale, shift, branch, gate) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _LayerNorm.apply(x, scale, shift, eps, branch, gate, dtype)
    total, y = layer_norm_op(x, scale, shift, eps, branch, gate, dtype)
    return x if branch is None else total, y
