"""Nearest-neighbour 2× up-sampling and a 3×3 convolution, as four 2×2 convolutions of the small image.

    planes[2 i + j] = conv3x3(upsample(x), weight)[:, :, i::2, j::2]

The pixels that a 3×3 window covers after up-sampling are only 2×2 different ones, so taps that fall on the same pixel
are added up first: 4 products for each output instead of 9. x: [B, C, H, W] channels-last; weight: [K, C, 3, 3];
planes: [4 B, K, H, W], the four parities one after the other, as `duplicate_shuffle_add` takes them.
"""

import torch
import torch.nn.functional as F

from ._library import KERNEL_DTYPES, define, differentiable_as, launcher
from .conv2d import convolve
from .shuffle import to_planes


def upsample_conv2d_reference(x, weight):
    return to_planes(F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1))


def _accepts(x, weight):
    return x.dtype in KERNEL_DTYPES and weight.dtype == x.dtype and x.numel() > 0


def _launch(x, weight):
    batch, _, height, width = x.shape
    size = (4 * batch, weight.shape[0], height, width)
    planes = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    weights = launcher("upsample_conv2d", "launch_subpixel_weights")(weight)
    for parity, (plane, part) in enumerate(zip(planes.chunk(4), weights, strict=True)):
        i, j = divmod(parity, 2)
        convolve(x, part, (1 - i, 1 - j, i, j), plane)
    return planes


_forward = define("upsample_conv2d(Tensor x, Tensor weight) -> Tensor", upsample_conv2d_reference, _accepts, _launch)
differentiable_as(_forward, upsample_conv2d_reference)


def upsample_conv2d(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """3×3 convolution with padding 1 of the image up-sampled 2×, as four planes: see the head of this file.

    x: [B, C, H, W]; weight: [K, C, 3, 3]. Returns [4 B, K, H, W] channels-last, x.dtype. Raises ValueError on other
    shapes.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"x is {list(x.shape)}, weight {list(weight.shape)}: expected [B, C, H, W] and [K, C, 3, 3]")
    return _forward(x, weight)
