"""Rounding to int8: activations with one scale for each channel, weights with one scale for each filter.

    quantize:         q_c = clamp(round(x_c · factor_c), -127, 127),    factor_c = 1 / scale_c
    quantize_weight:  scale_k = max |weight_k| / 127,    q_k = weight_k / scale_k, rounded

Rounds half to even; products in fp32. The sum of each window of a weight is rounded to nearest as well, for which a few
of its weights are rounded in the other direction: neighbouring pixels are similar, so that errors of a window add up.
Infinities become ±127; the result for NaN is not defined. Inference only: there are no gradients.

Operators that write int8 take the factors as `out_factor`, [C] in fp32. A convolution has no scales of its input: each
scale_c is part of the weight, weight[:, c] · scale_c, before the weight is quantised.
"""

import math

import torch

from ._library import KERNEL_DTYPES, define

MOST = 127  # not 128, so that the range is symmetric


def quantize_reference(x, factor):
    return (x.float() * factor.view(-1, 1, 1)).clamp(-MOST, MOST).round().to(torch.int8)


def with_int8(y: torch.Tensor, dtype: torch.dtype, out_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A result y in fp32 as the references of operators return it that write int8 too: in `dtype`, and quantised."""
    return y.to(dtype), quantize_reference(y, out_factor)


def _accepts(x, factor):
    return x.dtype in KERNEL_DTYPES


quantize_op = define("quantize(Tensor x, Tensor factor) -> Tensor", quantize_reference, _accepts, "quantize")


def check_factor(name: str, factor: torch.Tensor, channels: int) -> None:
    """Raises ValueError unless there is a factor in fp32 for each channel."""
    if factor.shape != (channels,) or factor.dtype != torch.float32:
        raise ValueError(
            f"{name} is {list(factor.shape)} {factor.dtype}; expected [{channels}] torch.float32, for each channel"
        )


def check_no_gradient(*tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError if autograd would need a gradient of an operator that has none."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError("8-bit operators have no gradients: call them under torch.no_grad()")


def quantize(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x · factor as int8; see the head of this file.

    x: [B, C, H, W]; factor: [C] fp32. Returns int8, channels-last. Raises ValueError on other shapes and types of the
    factor, RuntimeError if x requires a gradient.
    """
    if x.dim() != 4:
        raise ValueError(f"x is {list(x.shape)}; expected [B, C, H, W]")
    check_factor("factor", factor, x.shape[1])
    check_no_gradient(x, factor)
    return quantize_op(x, factor)


@torch.no_grad()
def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of a weight; see the head of this file.

    weight: [K, ...], a filter or row after the other. Returns q as int8, channels-last if it has four dimensions, and
    scale [K] in fp32. The scale of a filter of zeros is 1.
    """
    wide = weight.float().flatten(1)
    largest = wide.abs().amax(1)
    scale = torch.where(largest > 0, largest / MOST, 1.0)
    windows = (wide / scale[:, None]).view(*weight.shape[:2], math.prod(weight.shape[2:]))
    q = _rounded(windows).clamp(-MOST, MOST).to(torch.int8).view(weight.shape)
    return q.contiguous(memory_format=torch.channels_last) if q.dim() == 4 else q, scale


def _rounded(windows: torch.Tensor) -> torch.Tensor:
    """The weights [K, C, taps], rounded, and so is the sum of each window: if the sum is some steps too high or too
    low, as many weights are rounded in the other direction, those with the largest errors.
    """
    q = windows.round()
    error = q - windows
    steps = error.sum(2, keepdim=True).round()
    rank = (error * steps.sign()).argsort(dim=2, descending=True, stable=True).argsort(2)
    return q - steps.sign() * (rank < steps.abs())
