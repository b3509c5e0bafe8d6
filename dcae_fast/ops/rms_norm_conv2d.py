"""Channel RMS norm, activation and 3×3 convolution to few channels, the end of a decoder.

    y = conv3x3(act(x * rsqrt(mean_c(x²) + eps) * norm_weight + norm_bias), weight) + bias

x: [B, C, H, W] channels-last; norm_weight, norm_bias: [C]; weight: [N, C, 3, 3], padding 1; bias: [N]; y: [B, N, H, W]
channels-last. Statistics and sums in fp32. The input of the convolution and the sum of each tap over the channels are
rounded to the type of x.
"""

import torch
import torch.nn.functional as F

from dcae_fast.models import functional

from ._elementwise import activate, check_activation, check_filters
from ._library import HALVES, KERNEL_DTYPES, define, differentiable_as

MOST_CHANNELS, MOST_FILTERS = 1024, 16  # that the kernel takes


def rms_norm_conv2d_reference(x, norm_weight, norm_bias, eps, act, weight, bias):
    y = activate(functional.rms_norm(x, norm_weight, norm_bias, eps), act)
    return F.conv2d(y, weight, bias, padding=1)


def _accepts(x, norm_weight, norm_bias, eps, act, weight, bias):
    """Half precision of one type. In fp32 `rms_norm` and a library's convolution are faster."""
    return (
        x.dtype in HALVES
        and weight.dtype == x.dtype
        and all(tensor is None or tensor.dtype in KERNEL_DTYPES for tensor in (norm_weight, norm_bias, bias))
        and x.shape[1] <= MOST_CHANNELS
        and weight.shape[0] <= MOST_FILTERS
    )


rms_norm_conv2d_op = define(
    "rms_norm_conv2d(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, str act, Tensor weight, Tensor? bias)"
    " -> Tensor",
    rms_norm_conv2d_reference,
    _accepts,
    "rms_norm_conv2d",
)
differentiable_as(rms_norm_conv2d_op, rms_norm_conv2d_reference)


def rms_norm_conv2d(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> torch.Tensor:
    """conv3x3(act(rms_norm(x))) + bias; see the head of this file.

    x: [B, C, H, W]; norm_weight, norm_bias: [C]; weight: [N, C, 3, 3]; bias: [N]; act: "none", "relu" or "silu".
    Returns [B, N, H, W] channels-last, in the type of x. Raises ValueError on other shapes or activations.
    """
    check_activation(act)
    channels = x.shape[1:2]
    if x.dim() != 4 or not norm_weight.shape == norm_bias.shape == channels or weight.shape[1:] != (*channels, 3, 3):
        raise ValueError(
            f"x {list(x.shape)}, norm {list(norm_weight.shape)} {list(norm_bias.shape)}, weight {list(weight.shape)}:"
            " expected [B, C, H, W], [C], [C], [N, C, 3, 3]"
        )
    check_filters(weight, bias=bias)
    return rms_norm_conv2d_op(x, norm_weight, norm_bias, eps, act, weight, bias)
