"""Rounding to int8: activations with one scale for the whole tensor, weights with one scale for each filter.

    quantize:         q = clamp(round(x / scale), -127, 127)
    quantize_weight:  scale_k = max |weight_k| / 127,   q_k = quantize(weight_k, scale_k)

Rounds half to even. x / scale is computed as x · (1 / scale) in fp32. Infinities become ±127; the result for NaN is not
defined. Inference only: there are no gradients.
"""

import math

import torch

from ._library import KERNEL_DTYPES, define

MOST = 127  # not 128, so that the range is symmetric


def quantize_reference(x, scale):
    return (x.float() * (1 / scale)).clamp(-MOST, MOST).round().to(torch.int8)


def with_int8(y: torch.Tensor, dtype: torch.dtype, out_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A result y in fp32 as the references of operators return it that write int8 too: in `dtype`, and quantised."""
    return y.to(dtype), quantize_reference(y, out_scale)


def _accepts(x, scale):
    return x.dtype in KERNEL_DTYPES


quantize_op = define("quantize(Tensor x, float scale) -> Tensor", quantize_reference, _accepts, "quantize")


def check_scale(name: str, scale: float) -> None:
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}={scale}; expected a positive finite number")


def check_no_gradient(*tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError if autograd would need a gradient of an operator that has none."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError("8-bit operators have no gradients: call them under torch.no_grad()")


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x as int8 in units of `scale`; see the head of this file.

    x: any shape. Returns int8, channels-last if x has four dimensions. Raises ValueError unless scale is positive and
    finite, RuntimeError if x requires a gradient.
    """
    check_scale("scale", scale)
    check_no_gradient(x)
    return quantize_op(x, scale)


@torch.no_grad()
def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of a weight; see the head of this file.

    weight: [K, ...], a filter or row after the other. Returns q as int8, channels-last if it has four dimensions, and
    scale [K] in fp32. The scale of a filter of zeros is 1.
    """
    wide = weight.float().flatten(1)
    largest = wide.abs().amax(1)
    scale = torch.where(largest > 0, largest / MOST, 1.0)
    q = (wide / scale[:, None]).round().clamp(-MOST, MOST).to(torch.int8).view(weight.shape)
    return q.contiguous(memory_format=torch.channels_last) if q.dim() == 4 else q, scale
