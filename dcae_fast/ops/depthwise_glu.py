"""3×3 depthwise convolution with bias, and value · SiLU(gate) of its two halves of channels, in one pass.

    c = depthwise3x3(x, weight) + bias,    y[m] = c[m] * silu(c[M + m])

x: [B, 2 M, H, W] channels-last, padded by 1 with zeros; weight: [2 M, 1, 3, 3]; bias: [2 M]; y: [B, M, H, W]
channels-last, in the type of x. Sums in fp32. Source: GLUMBConv of DC-AE (arXiv 2410.10733), SANA (arXiv 2410.10629).

`depthwise_glu_int8` returns y as int8, the operand of an 8-bit convolution. Nothing is rounded before int8.
"""

import torch
import torch.nn.functional as F

from ._elementwise import activate_backward, sum_to_channels
from ._library import (
    KERNEL_DTYPES,
    are_aligned,
    as_x_or_float32,
    define,
    differentiable,
    differentiable_as,
    halves_on_hopper,
)
from .quantize import check_factor, check_no_gradient, quantize_reference


def _convolution(x, weight, bias):
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=x.shape[1])


def depthwise_glu_reference(x, weight, bias):
    value, gate = _convolution(x, weight, bias).chunk(2, dim=1)
    return value * F.silu(gate)


def depthwise_glu_int8_reference(x, weight, bias, out_factor):
    return quantize_reference(depthwise_glu_reference(x.float(), weight, bias), out_factor)


def depthwise_glu_backward_reference(dout, x, weight, bias, parameters):
    value, gate = _convolution(x, weight, bias).chunk(2, dim=1)
    dconv = torch.cat([dout * F.silu(gate), activate_backward(gate, dout * value, "silu")], dim=1)
    mask = [True, parameters, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dconv, x, weight.to(x.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], x.shape[1], mask
    )
    if not parameters:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, dweight.to(weight.dtype), sum_to_channels(dconv).to(bias.dtype)


def _accepts(x, weight, bias, out_factor=None):
    return all(tensor.dtype in KERNEL_DTYPES for tensor in (x, weight, bias))


def _cuda_accepts(x, weight, bias, *gradient):
    """The kernels of the CUDA extension take a multiple of 16 channels."""
    return halves_on_hopper(x, *gradient) and x.shape[1] % 16 == 0 and as_x_or_float32(x, weight, bias)


depthwise_glu_op = define(
    "depthwise_glu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    depthwise_glu_reference,
    _accepts,
    "depthwise_glu",
    _cuda_accepts,
)
depthwise_glu_int8_op = define(
    "depthwise_glu_int8(Tensor x, Tensor weight, Tensor bias, Tensor out_factor) -> Tensor",
    depthwise_glu_int8_reference,
    _accepts,
    "depthwise_glu",
    lambda x, weight, bias, factor: _cuda_accepts(x, weight, bias) and are_aligned((factor,), torch.float32),
)
depthwise_glu_backward_op = define(
    "depthwise_glu_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, bool parameters)"
    " -> (Tensor, Tensor, Tensor)",
    depthwise_glu_backward_reference,
    lambda dout, x, weight, bias, _: _accepts(x, weight, bias),
    "depthwise_glu",
    lambda dout, x, weight, bias, _: _cuda_accepts(x, weight, bias, dout),
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout):
    wants_parameters = any(ctx.needs_input_grad[1:])
    dx, *of_parameters = depthwise_glu_backward_op(dout, *ctx.saved_tensors, wants_parameters)
    return dx, *(of_parameters if wants_parameters else (None, None))


differentiable(depthwise_glu_op, _backward, _setup_context)
differentiable_as(depthwise_glu_backward_op, depthwise_glu_backward_reference)


def depthwise_glu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """value · SiLU(gate) of the 3×3 depthwise convolution of x; see the head of this file.

    x: [B, 2 M, H, W]; weight: [2 M, 1, 3, 3]; bias: [2 M]. Returns [B, M, H, W] channels-last, in the type of x. Raises
    ValueError on other shapes.
    """
    _check(x, weight, bias)
    return depthwise_glu_op(x, weight, bias)


def depthwise_glu_int8(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out_factor: torch.Tensor
) -> torch.Tensor:
    """The result of `depthwise_glu` times out_factor, [M] fp32, as int8; for inference.

    Raises ValueError as `depthwise_glu` does and for other factors, RuntimeError if a tensor requires a gradient.
    """
    _check(x, weight, bias)
    check_factor("out_factor", out_factor, x.shape[1] // 2)
    check_no_gradient(x, weight, bias, out_factor)
    return depthwise_glu_int8_op(x, weight, bias, out_factor)


def _check(x, weight, bias):
    channels = x.shape[1] if x.dim() == 4 else -1
    if channels < 0 or channels % 2 or weight.shape != (channels, 1, 3, 3) or bias.shape != (channels,):
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}:"
            " expected [B, 2 M, H, W], [2 M, 1, 3, 3], [2 M]"
        )
