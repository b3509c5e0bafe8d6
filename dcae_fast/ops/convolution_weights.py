"""Weights of convolutions, prepared for a kernel: with a batch norm folded in, or for 2× up-sampling before them.

    fold_batch_norm:     factor = scale * rsqrt(variance + eps)
                         folded = weight * factor,   shift = bias - mean * factor
    subpixel_weights:    planes[2 i + j] = A_i · weight · A_jᵀ for each filter and channel,
                         A_0 = [[1, 0, 0], [0, 1, 1]],   A_1 = [[1, 1, 0], [0, 0, 1]]
    transposed_weights:  transposed = B · weight · Bᵀ for each filter and channel,
                         B = [[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]]

fold_batch_norm: conv(x, folded) + shift is the batch norm, in inference, of conv(x, weight). weight: [K, C, R, S];
bias, scale, mean, variance: [K].

subpixel_weights: after nearest-neighbour up-sampling, the output pixel (2 y + i, 2 x + j) of a 3×3 convolution reads
only 2×2 different input pixels, with the weights planes[2 i + j]. weight: [K, C, 3, 3]; the four planes lie one after
the other in [4 K, C, 2, 2].

transposed_weights: the convolution of the up-sampled image is also a transposed convolution of the small image, with
stride 2, padding 1 and the weight `transposed`, [C, K, 4, 4]. Its gradients take 4 products instead of 9, too.

Sums are in fp32. The results have the type `dtype`, by default the weight's; weights are channels-last.
"""

import torch

from ._elementwise import check_filters
from ._library import (
    KERNEL_DTYPES,
    as_channels_last,
    define,
    differentiable,
    differentiable_as,
    without_autocast,
)

TAPS = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))  # A_0 and A_1
TRANSPOSED_TAPS = (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)  # B


def fold_batch_norm_reference(weight, bias, scale, mean, variance, eps, dtype):
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = scale.to(wide) * torch.rsqrt(variance.to(wide) + eps)
    shift = bias.to(wide) - mean.to(wide) * factor
    return (weight.to(wide) * factor[:, None, None, None]).to(dtype), shift.to(dtype)


@without_autocast
def subpixel_weights_reference(weight, dtype):
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    taps = torch.tensor(TAPS, dtype=wide.dtype, device=wide.device)
    return torch.einsum("iar,jbs,kcrs->ijkcab", taps, taps, wide).flatten(0, 2).to(dtype)


@without_autocast
def transposed_weights_reference(weight, dtype):
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    taps = torch.tensor(TRANSPOSED_TAPS, dtype=wide.dtype, device=wide.device)
    return torch.einsum("sa,tb,kcab->ckst", taps, taps, wide).to(dtype)


@without_autocast
def transposed_weights_backward_reference(dtransposed, dtype):
    wide = dtransposed.to(torch.promote_types(dtransposed.dtype, torch.float32))
    taps = torch.tensor(TRANSPOSED_TAPS, dtype=wide.dtype, device=wide.device)
    return torch.einsum("sa,tb,ckst->kcab", taps, taps, wide).to(dtype)


def _accepts(weight, *_):
    return weight.dtype in KERNEL_DTYPES and weight.numel() > 0


fold_batch_norm_op = define(
    "fold_batch_norm(Tensor weight, Tensor bias, Tensor scale, Tensor mean, Tensor variance, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor)",
    fold_batch_norm_reference,
    _accepts,
    "bias_act",
)
subpixel_weights_op = define(
    "subpixel_weights(Tensor weight, ScalarType dtype) -> Tensor",
    subpixel_weights_reference,
    _accepts,
    "upsample_conv2d",
)
transposed_weights_op = define(
    "transposed_weights(Tensor weight, ScalarType dtype) -> Tensor",
    transposed_weights_reference,
    _accepts,
    "upsample_conv2d",
)
transposed_weights_backward_op = define(
    "transposed_weights_backward(Tensor dtransposed, ScalarType dtype) -> Tensor",
    transposed_weights_backward_reference,
    _accepts,
    "upsample_conv2d",
)


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype


def _backward(ctx, dtransposed):
    return transposed_weights_backward_op(dtransposed, ctx.dtype), None


differentiable(transposed_weights_op, _backward, _setup_context)
differentiable_as(transposed_weights_backward_op, transposed_weights_backward_reference)
differentiable_as(fold_batch_norm_op, fold_batch_norm_reference)
differentiable_as(subpixel_weights_op, subpixel_weights_reference)


def fold_batch_norm(
    weight: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(folded, shift) of a convolution's weight and the batch norm behind it; see the head of this file.

    scale and bias are the batch norm's weight and bias. Raises ValueError unless weight is [K, C, R, S] and the others
    are [K].
    """
    if weight.dim() != 4:
        raise ValueError(f"weight is {list(weight.shape)}; expected [K, C, R, S]")
    check_filters(weight, bias=bias, scale=scale, mean=mean, variance=variance)
    return fold_batch_norm_op(weight, bias, scale, mean, variance, eps, dtype or weight.dtype)


def subpixel_weights(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The four 2×2 kernels for each 3×3 kernel, [4 K, C, 2, 2] channels-last; see the head of this file.

    Raises ValueError unless weight is [K, C, 3, 3].
    """
    _check_3x3(weight)
    return subpixel_weights_op(weight, dtype or weight.dtype)


def transposed_weights(weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight [C, K, 4, 4], channels-last, of a transposed convolution with stride 2 and padding 1 that equals
    up-sampling and the convolution with `weight`; see the head of this file.

    Raises ValueError unless weight is [K, C, 3, 3].
    """
    _check_3x3(weight)
    return transposed_weights_op(weight, dtype or weight.dtype)


def _check_3x3(weight: torch.Tensor) -> None:
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight is {list(weight.shape)}; expected [K, C, 3, 3]")


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous weight [K, C, R, S] that is channels-last. Not differentiable."""
    device = weight.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return as_channels_last(weight)
    with torch.cuda.device(device):
        return as_channels_last(weight)
