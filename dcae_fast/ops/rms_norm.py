"""Channel RMS norm with an optional activation and residual.

    y = act(x * rsqrt(mean_c(x²) + eps) * weight + bias) + residual

x, residual, y: [B, C, H, W] channels-last; weight, bias: [C]. Statistics in fp32. The norm has `dtype`, by default the
type of x; y has the promoted type of norm and residual. Source: "trms2d" of DC-AE (arXiv 2410.10733, original code).

`rms_norm_int8` returns (y, q), where q is y as int8, the operand of an 8-bit convolution. Nothing is rounded before q.
"""

import torch

from dcae_fast.models import functional

from ._elementwise import activate, activate_backward, check_activation, sum_dtype, sum_to_channels
from ._library import KERNEL_DTYPES, define, differentiable, differentiable_as
from .quantize import check_factor, check_no_gradient, with_int8

MAX_CHANNELS = 8192


def rms_norm_reference(x, weight, bias, eps, act, residual, dtype):
    y = activate(functional.rms_norm(x, weight, bias, eps), act)
    return (y if residual is None else y + residual).to(dtype)


def rms_norm_int8_reference(x, weight, bias, eps, act, residual, dtype, out_factor):
    y = rms_norm_reference(x.float(), weight, bias, eps, act, residual, torch.float32)
    return with_int8(y, dtype, out_factor)


def rms_norm_backward_reference(dy, x, weight, bias, eps, act):
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dy, x32, w, b = dy.to(wide), x.to(wide), weight.to(wide).view(1, -1, 1, 1), bias.to(wide).view(1, -1, 1, 1)
    rstd = torch.rsqrt(x32.square().mean(1, keepdim=True) + eps)
    x_hat = x32 * rstd
    dz = activate_backward(x_hat * w + b, dy, act)
    dx_hat = dz * w
    dx = (dx_hat - x_hat * (dx_hat * x_hat).mean(1, keepdim=True)) * rstd
    return dx.to(x.dtype), sum_to_channels(dz * x_hat).to(weight.dtype), sum_to_channels(dz).to(bias.dtype)


def _accepts(x, weight, *_):
    return x.dtype in KERNEL_DTYPES and weight.dtype in KERNEL_DTYPES and x.shape[1] <= MAX_CHANNELS


rms_norm_op = define(
    "rms_norm(Tensor x, Tensor weight, Tensor bias, float eps, str act, Tensor? residual, ScalarType dtype) -> Tensor",
    rms_norm_reference,
    _accepts,
    "rms_norm",
)
rms_norm_int8_op = define(
    "rms_norm_int8(Tensor x, Tensor weight, Tensor bias, float eps, str act, Tensor? residual, ScalarType dtype,"
    " Tensor out_factor) -> (Tensor, Tensor)",
    rms_norm_int8_reference,
    _accepts,
    "rms_norm",
)
rms_norm_backward_op = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, float eps, str act)"
    " -> (Tensor, Tensor, Tensor)",
    rms_norm_backward_reference,
    lambda dy, *args: _accepts(*args),
    "rms_norm",
)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.eps, ctx.act, residual, _ = inputs
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx, dy):
    dx, dweight, dbias = rms_norm_backward_op(dy, *ctx.saved_tensors, ctx.eps, ctx.act)
    return dx, dweight, dbias, None, None, None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype), None


differentiable(rms_norm_op, _backward, _setup_context)
differentiable_as(rms_norm_backward_op, rms_norm_backward_reference)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    act: str = "none",
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act(x * rsqrt(mean_c(x²) + eps) * weight + bias) + residual.

    x, residual: [B, C, H, W]; weight, bias: [C]; act: "none", "relu" or "silu"; dtype: of the norm, by default the type
    of x. Returns [B, C, H, W] channels-last, in the promoted type of `dtype` and residual. Raises ValueError on other
    shapes or activations.
    """
    _check(x, weight, bias, act)
    return rms_norm_op(x, weight, bias, eps, act, residual, sum_dtype(x, residual, dtype))


def rms_norm_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out_factor: torch.Tensor,
    eps: float = 1e-5,
    act: str = "none",
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, q): `rms_norm`, and the same times out_factor, [C] fp32, as int8; for inference.

    Raises ValueError as `rms_norm` does and for other factors, RuntimeError if a tensor requires a gradient.
    """
    _check(x, weight, bias, act)
    check_factor("out_factor", out_factor, x.shape[1])
    check_no_gradient(x, weight, bias, residual, out_factor)
    return rms_norm_int8_op(x, weight, bias, eps, act, residual, sum_dtype(x, residual), out_factor)


def _check(x, weight, bias, act):
    check_activation(act)
    if x.dim() != 4 or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}: expected [B, C, H, W], [C], [C]"
        )
