"""Bias or batch norm in evaluation, activation and residual after a convolution, in one pass.

    y = act(x + bias) + residual
    y = act((x - mean) * rsqrt(variance + eps) * scale + bias) + residual

x, residual, y: [B, C, H, W] channels-last; bias, scale, mean, variance: [C]. Computed in fp32; y has the promoted type
of x and residual. mean and variance are constants: they get no gradient.
"""

import torch

from ._elementwise import activate, activate_backward, check_activation, sum_dtype, sum_to_channels
from ._library import KERNEL_DTYPES, define, differentiable, differentiable_as


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _normalised(x, scale, mean, variance, eps):
    """x, normalised if there is a norm, and the factor by which scale and norm together multiply x."""
    if scale is None:
        return _wide(x), 1.0
    channel = (1, -1, 1, 1)
    rstd = torch.rsqrt(_wide(variance) + eps).view(channel)
    return (_wide(x) - _wide(mean).view(channel)) * rstd, rstd * _wide(scale).view(channel)


def _affine(x, bias, scale, mean, variance, eps):
    z, _ = _normalised(x, scale, mean, variance, eps)
    if scale is not None:
        z = z * _wide(scale).view(1, -1, 1, 1)
    return z + _wide(bias).view(1, -1, 1, 1)


def bias_act_reference(x, bias, act, scale, mean, variance, eps, residual, dtype):
    y = activate(_affine(x, bias, scale, mean, variance, eps), act)
    return (y if residual is None else y + residual).to(dtype)


def bias_act_backward_reference(dy, x, bias, act, scale, mean, variance, eps):
    dz = activate_backward(_affine(x, bias, scale, mean, variance, eps), _wide(dy), act)
    normalised, factor = _normalised(x, scale, mean, variance, eps)
    dbias, dscale = sum_to_channels(dz).to(bias.dtype), sum_to_channels(dz * normalised)
    return (dz * factor).to(x.dtype), dbias, dscale.to(bias.dtype if scale is None else scale.dtype)


def _accepts(x, bias, *_):
    return x.dtype in KERNEL_DTYPES and bias.dtype in KERNEL_DTYPES


_NORM = "Tensor? scale, Tensor? mean, Tensor? variance, float eps"
bias_act_op = define(
    f"bias_act(Tensor x, Tensor bias, str act, {_NORM}, Tensor? residual, ScalarType dtype) -> Tensor",
    bias_act_reference,
    _accepts,
    "bias_act",
)
bias_act_backward_op = define(
    f"bias_act_backward(Tensor dy, Tensor x, Tensor bias, str act, {_NORM}) -> (Tensor, Tensor, Tensor)",
    bias_act_backward_reference,
    lambda dy, *args: _accepts(*args),
    "bias_act",
)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.act, scale, mean, variance, ctx.eps, residual, _ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, bias, scale, mean, variance)


def _backward(ctx, dy):
    x, bias, scale, mean, variance = ctx.saved_tensors
    dx, dbias, dscale = bias_act_backward_op(dy, x, bias, ctx.act, scale, mean, variance, ctx.eps)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, dbias, None, None if scale is None else dscale, None, None, None, dresidual, None


differentiable(bias_act_op, _backward, _setup_context)
differentiable_as(bias_act_backward_op, bias_act_backward_reference)


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor,
    act: str = "none",
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    variance: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """act(x + bias) + residual, or act((x - mean) * rsqrt(variance + eps) * scale + bias) + residual.

    x, residual: [B, C, H, W]; bias, scale, mean, variance: [C]; act: "none", "relu" or "silu". Returns [B, C, H, W]
    channels-last, in the promoted type of x and residual. Raises ValueError on other shapes or activations, and unless
    scale, mean and variance come together.
    """
    check_activation(act)
    if not (scale is None) == (mean is None) == (variance is None):
        raise ValueError("scale, mean and variance: expected all of them or none")
    parameters = {"bias": bias} if scale is None else {"bias": bias, "scale": scale, "mean": mean, "variance": variance}
    for name, parameter in parameters.items():
        if x.dim() != 4 or parameter.shape != x.shape[1:2]:
            raise ValueError(f"x is {list(x.shape)}, {name} {list(parameter.shape)}: expected [B, C, H, W] and [C]")
    return bias_act_op(x, bias, act, scale, mean, variance, eps, residual, sum_dtype(x, residual))
