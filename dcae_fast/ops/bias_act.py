"""What follows a convolution without a norm, or with a batch norm in evaluation, in one pass.

    y = act(x * scale + bias) + residual

x, residual: [B, C, H, W] channels-last; bias, scale: [C]. Computed in fp32; returns x's type
promoted with the residual's.
"""

import torch

from ._elementwise import activate, activate_backward, check_activation, sum_dtype, sum_to_channels
from ._library import KERNEL_DTYPES, define, differentiable


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _affine(x, bias, scale):
    z = _wide(x)
    if scale is not None:
        z = z * _wide(scale).view(1, -1, 1, 1)
    return z + _wide(bias).view(1, -1, 1, 1)


def bias_act_reference(x, bias, act, scale, residual, dtype):
    y = activate(_affine(x, bias, scale), act)
    return (y if residual is None else y + residual).to(dtype)


def bias_act_backward_reference(dy, x, bias, act, scale):
    dz = activate_backward(_affine(x, bias, scale), _wide(dy), act)
    dbias = sum_to_channels(dz).to(bias.dtype)
    if scale is None:
        return dz.to(x.dtype), dbias, torch.zeros_like(dbias)
    return (dz * _wide(scale).view(1, -1, 1, 1)).to(x.dtype), dbias, sum_to_channels(dz * x).to(scale.dtype)


def _accepts(x, bias, *_):
    return x.dtype in KERNEL_DTYPES and bias.dtype in KERNEL_DTYPES


_forward = define(
    "bias_act(Tensor x, Tensor bias, str act, Tensor? scale, Tensor? residual, ScalarType dtype) -> Tensor",
    bias_act_reference,
    _accepts,
)
_backward = define(
    "bias_act_backward(Tensor dy, Tensor x, Tensor bias, str act, Tensor? scale) -> (Tensor, Tensor, Tensor)",
    bias_act_backward_reference,
    lambda dy, *args: _accepts(*args),
    operator="bias_act",
)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.act, scale, residual, _ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, bias, scale)


def _gradient(ctx, dy):
    x, bias, scale = ctx.saved_tensors
    dx, dbias, dscale = _backward(dy, x, bias, ctx.act, scale)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, dbias, None, None if scale is None else dscale, dresidual, None


differentiable(_forward, _gradient, _setup_context)


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor,
    act: str = "none",
    scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(x * scale + bias) + residual.

    x, residual: [B, C, H, W]; bias, scale: [C]; act: "none", "relu" or "silu". Returns channels-last, of
    the promoted type of x and residual. Raises ValueError on other shapes or activations.
    """
    check_activation(act)
    if x.dim() != 4 or bias.shape != x.shape[1:2] or (scale is not None and scale.shape != bias.shape):
        scale_shape = None if scale is None else list(scale.shape)
        raise ValueError(
            f"x {list(x.shape)}, bias {list(bias.shape)}, scale {scale_shape}: expected [B, C, H, W], [C], [C] or None"
        )
    return _forward(x, bias, act, scale, residual, sum_dtype(x, residual))
