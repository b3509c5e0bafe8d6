"""Nearest-neighbour 2× up-sampling and a 3×3 convolution, as four 2×2 convolutions of the small image.

    planes[2 i + j] = conv3x3(upsample(x), weight)[:, :, i::2, j::2] = conv2x2(x, weights[2 i + j])

This takes 4 products for each output instead of 9. `subpixel_weights` computes the four weights. x: [B, C, H, W]
channels-last; weights: [4 K, C, 2, 2]; planes: [4 B, K, H, W], one parity after the other, as `duplicate_shuffle_add`
takes them.
"""

import torch
import torch.nn.functional as F

from . import _convolution_plans, _plans
from ._library import HALVES, KERNEL_DTYPES, are_aligned, define, differentiable_as
from .conv2d import convolve


def _paddings():
    """(top, left, bottom, right) for each parity (i, j): even outputs read the pixel before them, odd ones after."""
    return [(1 - i, 1 - j, i, j) for i in (0, 1) for j in (0, 1)]


def upsample_conv2d_reference(x, weights):
    parts = zip(weights.chunk(4), _paddings(), strict=True)
    planes = [F.conv2d(F.pad(x, (left, right, top, bottom)), part) for part, (top, left, bottom, right) in parts]
    return torch.cat(planes)


def _accepts(x, weights):
    return x.dtype in KERNEL_DTYPES and weights.dtype == x.dtype and x.numel() > 0


def _empty_planes(x, weights):
    batch, _, height, width = x.shape
    size = (4 * batch, weights.shape[0] // 4, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _launch(x, weights):
    planes = _empty_planes(x, weights)
    for plane, part, padding in zip(planes.chunk(4), weights.chunk(4), _paddings(), strict=True):
        convolve(x, part, padding, plane)
    return planes


def _prepare(x, weights):
    """Runs the plans that are known by then for this shape, without looking at the arguments again."""
    parts, planes = weights.chunk(4), _empty_planes(x, weights).chunk(4)
    if not _convolution_plans.available() or not are_aligned((x, *parts, *planes), *HALVES):
        return None
    shapes = (_convolution_plans.shape_of(x, parts[0], 1, padding, []) for padding in _paddings())
    keys = [_plans.key_of(_convolution_plans.CUDNN, shape, x.device) for shape in shapes]

    def run(x, weights):
        plans = [_plans.found(key) for key in keys]
        if None in plans:
            return _launch(x, weights)
        planes = _empty_planes(x, weights)
        for plan, part, plane in zip(plans, weights.chunk(4), planes.chunk(4), strict=True):
            plan(x, part, [], plane)
        return planes

    return run


upsample_conv2d_op = define(
    "upsample_conv2d(Tensor x, Tensor weights) -> Tensor",
    upsample_conv2d_reference,
    _accepts,
    _launch,
    prepare=_prepare,
)
differentiable_as(upsample_conv2d_op, upsample_conv2d_reference)


def upsample_conv2d(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """3×3 convolution with padding 1 of the image up-sampled 2×, as four planes; see the head of this file.

    x: [B, C, H, W]; weights: [4 K, C, 2, 2], of `subpixel_weights`. Returns [4 B, K, H, W] channels-last, x.dtype.
    Raises ValueError on other shapes.
    """
    if x.dim() != 4 or weights.dim() != 4 or weights.shape[1:] != (x.shape[1], 2, 2) or weights.shape[0] % 4:
        raise ValueError(
            f"x is {list(x.shape)}, weights {list(weights.shape)}: expected [B, C, H, W] and [4 K, C, 2, 2]"
        )
    return upsample_conv2d_op(x, weights)
