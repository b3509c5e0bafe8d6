"""Gradients of a 3×3 convolution with stride 1 and padding 1, as `res_block` needs them.

    flipped[c, k, i, j] = weight[k, c, 2 - i, 2 - j]
    conv(dy, flipped) is the gradient of x in y = conv(x, weight)
    dz = act'(z + bias) * conv(dy, flipped),   dbias = Σ_bhw dz

So the gradient of x is a convolution itself, and cuDNN can multiply by act' within it. x, z: [B, C, H, W]
channels-last; dy: [B, K, H, W]; weight: [K, C, 3, 3]; bias, dbias: [C]. Sums are in fp32.
"""

import torch
import torch.nn.functional as F

from . import _convolution_plans
from ._elementwise import sum_to_channels
from ._library import HALVES, KERNEL_DTYPES, are_aligned, define, differentiable_as
from .bias_act import bias_act_backward_op, bias_act_backward_reference
from .conv2d import conv2d_reference

PADDING = 1, 1, 1, 1
NO_NORM = None, None, None, 0.0  # scale, mean, variance, eps of `bias_act`


def flip_weight_reference(weight, dtype):
    rounded = weight.new_empty(0, dtype=dtype) if weight.dtype == dtype else weight.to(dtype)
    return rounded, weight.to(dtype).flip(2, 3).transpose(0, 1)


def sum_to_channels_reference(x, dtype):
    return sum_to_channels(x.to(torch.promote_types(x.dtype, torch.float32))).to(dtype)


def conv2d_act_backward_reference(dy, flipped, z, bias, act, wants_bias):
    bias = z.new_zeros(z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32)) if bias is None else bias
    dz, dbias, _ = bias_act_backward_reference(F.conv2d(dy, flipped, padding=1), z, bias, act, *NO_NORM)
    return dz, dbias if wants_bias else dbias.new_empty(0)


def _launch(dy, flipped, z, bias, act, wants_bias):
    """A plan multiplies by act' within the convolution; a pass over the result sums it. The fallback convolves, then
    multiplies and sums in one pass.
    """

    def summed(dz):
        return dz, sum_to_channels_op.dense_kernel(dz, dtype) if wants_bias else dz.new_empty(0, dtype=dtype)

    def fallback():
        dg = conv2d_reference(dy, flipped, None, "none", None, 1, PADDING).contiguous(memory_format=torch.channels_last)
        added = torch.zeros(z.shape[1], device=z.device) if bias is None else bias
        dz, dbias, _ = bias_act_backward_op.dense_kernel(dg, z, added, act, *NO_NORM)
        return dz, dbias if wants_bias else dbias.new_empty(0)

    dtype = torch.float32 if bias is None else bias.dtype
    if not (_convolution_plans.available() and _fits_plans(dy, flipped, z, bias)):
        return fallback()
    epilogue = [] if bias is None or act == "none" else [("operand_bias", bias)]
    epilogue += [] if act == "none" else [(f"{act}_backward", z)]
    plan = _convolution_plans.find(dy, flipped, 1, PADDING, epilogue, fallback, summed)
    return fallback() if plan is None else summed(plan(dy, flipped, [operand for _, operand in epilogue]))


def _fits_plans(dy, flipped, z, bias):
    halves = dy.is_cuda and dy.numel() > 0 and dy.dtype in HALVES and are_aligned((dy, flipped, z), dy.dtype)
    return halves and (bias is None or are_aligned([bias], *KERNEL_DTYPES))


flip_weight_op = define(
    "flip_weight(Tensor weight, ScalarType dtype) -> (Tensor, Tensor)",
    flip_weight_reference,
    lambda weight, dtype: weight.dtype in KERNEL_DTYPES and dtype in KERNEL_DTYPES,
    "flip_weight",
)
sum_to_channels_op = define(
    "sum_to_channels(Tensor x, ScalarType dtype) -> Tensor",
    sum_to_channels_reference,
    lambda x, dtype: x.dtype in KERNEL_DTYPES and dtype in KERNEL_DTYPES,
    "sum_to_channels",
)
conv2d_act_backward_op = define(
    "conv2d_act_backward(Tensor dy, Tensor flipped, Tensor z, Tensor? bias, str act, bool wants_bias)"
    " -> (Tensor, Tensor)",
    conv2d_act_backward_reference,
    lambda dy, *_: dy.dtype in KERNEL_DTYPES,
    _launch,
)
differentiable_as(flip_weight_op, flip_weight_reference)
differentiable_as(sum_to_channels_op, sum_to_channels_reference)
differentiable_as(conv2d_act_backward_op, conv2d_act_backward_reference)


def rounded_and_flipped(via, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in this dtype, and its flipped form. via: see _parts.py."""
    rounded, flipped = via(flip_weight_op)(weight, dtype)
    return weight if weight.dtype == dtype else rounded, flipped


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of the weight, channels-last, in the weight's dtype. Only shape and dtype of `weight` are read."""
    like = torch.empty(weight.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    ones, mask = [1, 1], [False, True, False]
    gradient = torch.ops.aten.convolution_backward(dy, x, like, None, ones, ones, ones, False, [0, 0], 1, mask)[1]
    return gradient.to(weight.dtype)
