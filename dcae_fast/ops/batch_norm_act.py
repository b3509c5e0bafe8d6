"""Batch norm with the statistics of the batch, activation and residual, for training.

    y = act((x - mean) * rsqrt(variance + eps) * scale + bias) + residual
    mean = mean_bhw(x),    variance = mean_bhw((x - mean)²)

x, residual, y: [B, C, H, W] channels-last; scale, bias, mean, variance: [C]. Computed in fp32; y has the promoted type
of x and residual; mean and variance are fp32 and have no gradient. Source: arXiv 1502.03167.
"""

import torch

from ._elementwise import activate_backward, check_activation, sum_dtype, sum_to_channels
from ._library import KERNEL_DTYPES, define, differentiable, differentiable_as
from .bias_act import bias_act_reference


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _statistics(x):
    """Mean and variance of the batch."""
    x = _wide(x)
    mean = x.mean((0, 2, 3))
    return mean, (x - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))


def batch_norm_act_reference(x, scale, bias, eps, act, residual, dtype):
    mean, variance = _statistics(x)
    return bias_act_reference(x, bias, act, scale, mean, variance, eps, residual, dtype), mean, variance


def batch_norm_act_backward_reference(dy, x, scale, bias, mean, variance, eps, act):
    """Computes the statistics again, because this gradient depends on x through them as well."""
    mean, variance = _statistics(x)
    mean, rstd, wide_scale, wide_bias = (
        c.view(1, -1, 1, 1) for c in (mean, torch.rsqrt(variance + eps), _wide(scale), _wide(bias))
    )
    normalised = (_wide(x) - mean) * rstd
    dz = activate_backward(normalised * wide_scale + wide_bias, _wide(dy), act)
    dbias, dscale, count = sum_to_channels(dz), sum_to_channels(dz * normalised), x.numel() // x.shape[1]
    of_mean = (dbias.view(1, -1, 1, 1) + normalised * dscale.view(1, -1, 1, 1)) / count
    return ((dz - of_mean) * rstd * wide_scale).to(x.dtype), dscale.to(scale.dtype), dbias.to(bias.dtype)


def _accepts(x, scale, bias, *_):
    return x.numel() and all(tensor.dtype in KERNEL_DTYPES for tensor in (x, scale, bias))


batch_norm_act_op = define(
    "batch_norm_act(Tensor x, Tensor scale, Tensor bias, float eps, str act, Tensor? residual, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    batch_norm_act_reference,
    _accepts,
    "batch_norm_act",
)
batch_norm_act_backward_op = define(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor scale, Tensor bias, Tensor mean, Tensor variance, float eps,"
    " str act) -> (Tensor, Tensor, Tensor)",
    batch_norm_act_backward_reference,
    lambda dy, *args: _accepts(*args),
    "batch_norm_act",
)


def _setup_context(ctx, inputs, output):
    x, scale, bias, ctx.eps, ctx.act, residual, _ = inputs
    _, mean, variance = output
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, scale, bias, mean, variance)


def _backward(ctx, dy, *_):
    dx, dscale, dbias = batch_norm_act_backward_op(dy, *ctx.saved_tensors, ctx.eps, ctx.act)
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return dx, dscale, dbias, None, None, dresidual, None


differentiable(batch_norm_act_op, _backward, _setup_context)
differentiable_as(batch_norm_act_backward_op, batch_norm_act_backward_reference)


def batch_norm_act(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    act: str = "none",
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(act((x - mean) * rsqrt(variance + eps) * scale + bias) + residual, mean, variance); see the head of this file.

    x, residual: [B, C, H, W]; scale, bias: [C]; act: "none", "relu" or "silu". The first result is [B, C, H, W]
    channels-last, in the promoted type of x and residual. Mean and variance of the batch are [C] in fp32; the variance
    is divided by the number of values, not by one less. Raises ValueError on other shapes or activations.
    """
    check_activation(act)
    if x.dim() != 4 or scale.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"x is {list(x.shape)}, scale {list(scale.shape)}, bias {list(bias.shape)}: expected [B, C, H, W], [C], [C]"
        )
    return batch_norm_act_op(x, scale, bias, eps, act, residual, sum_dtype(x, residual))
