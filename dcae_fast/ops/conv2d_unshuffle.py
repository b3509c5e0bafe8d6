"""3×3 convolution, bias and pixel-unshuffle by 2, as one 4×4 convolution with stride 2.

    y = pixel_unshuffle(conv3x3(x, weight) + bias, 2)

x: [B, C, H, W] channels-last; weight: [K, C, 3, 3], padding 1; bias: [K]; y: [B, 4 K, H / 2, W / 2] channels-last.

The unshuffle stacks four pixels, whose 3×3 windows lie in the same 4×4 pixels. Each of the four becomes a 4×4 filter:
its nine weights, surrounded by zeros. The result is thus written once instead of three times. The kernel is for few
channels.
"""

import torch
import torch.nn.functional as F

from dcae_fast.models import functional

from ._elementwise import check_filters
from ._library import define, differentiable_as
from .conv2d import has_few_channels


def conv2d_unshuffle_reference(x, weight, bias):
    return functional.pixel_unshuffle(F.conv2d(x, weight, bias, padding=1), 2)


conv2d_unshuffle_op = define(
    "conv2d_unshuffle(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    conv2d_unshuffle_reference,
    has_few_channels,
    "conv2d",
)
differentiable_as(conv2d_unshuffle_op, conv2d_unshuffle_reference)


def conv2d_unshuffle(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """pixel_unshuffle(conv3x3(x, weight) + bias, 2); see the head of this file.

    x: [B, C, H, W], H and W even; weight: [K, C, 3, 3]; bias: [K]. Returns [B, 4 K, H / 2, W / 2] channels-last, in
    the type of x. Raises ValueError on other shapes.
    """
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"x is {list(x.shape)}, weight {list(weight.shape)}: expected [B, C, H, W] with even H and W, [K, C, 3, 3]"
        )
    check_filters(weight, bias=bias)
    return conv2d_unshuffle_op(x, weight, bias)
