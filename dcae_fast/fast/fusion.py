"""Computes convolution, norm, activation and residual of existing modules in as few passes as possible."""

import torch
import torch.nn.functional as F
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._library import HALVES, KERNEL_DTYPES
from dcae_fast.ops._private import convolve, unobserved
from dcae_fast.ops.conv2d import FEW_CHANNELS
from dcae_fast.ops.linear import wants_gradient
from dcae_fast.ops.rms_norm_conv2d import MOST_CHANNELS, MOST_FILTERS

from . import operands
from .module import WEIGHTS, kind, plain

RMS_NORMS = ("RMSNorm2d", "TritonRMSNorm2d", "RMSNorm")
ACTIVATIONS = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "silu"}


def is_divisible(x: torch.Tensor, factor: int) -> bool:
    """Whether height and width are multiples of a factor. If not, the module's own forward raises the error."""
    return x.shape[2] % factor == x.shape[3] % factor == 0


def activation_name(act: nn.Module | None) -> str | None:
    """The name of an activation for the operators; None if they do not know it."""
    if act is None:
        return "none"
    return ACTIVATIONS.get(type(act)) if unobserved(act) else None


def unknown_activation(act: nn.Module | None) -> str:
    """Names an activation that the operators do not know; empty if they know it."""
    return "" if act is None or type(act) in ACTIVATIONS else f"its activation is {type(act).__name__}"


def unknown_norm(norm: nn.Module | None) -> str:
    """Names a norm that is neither a channel RMS norm nor a batch norm, each with weight and bias; else empty."""
    if norm is None:
        return ""
    of_batch, parameters = is_batch_norm(norm), norm._parameters
    if not of_batch and kind(norm) not in RMS_NORMS:
        return f"its norm is {type(norm).__name__}"
    if parameters.get("weight") is None or parameters.get("bias") is None:
        return "its norm has no weight or no bias"
    return "its norm keeps no running statistics" if of_batch and not norm.track_running_stats else ""


def can_fuse_norm(norm: nn.Module | None) -> bool:
    """Whether a norm is None, or a channel RMS norm or a batch norm, each with weight and bias."""
    if norm is None:
        return True
    if not unobserved(norm) or unknown_norm(norm):
        return False
    if is_batch_norm(norm) and not _are_weights(norm._buffers["running_mean"], norm._buffers["running_var"]):
        return False
    return _are_weights(norm._parameters["weight"], norm._parameters["bias"])


def _are_weights(*tensors: torch.Tensor | None) -> bool:
    """Whether all are None or ordinary tensors, of no subclass.

    torch.compile needs fewer guards for this than for `has_ordinary_weights`, which looks at all tensors of a module.
    """
    for tensor in tensors:
        if type(tensor) not in WEIGHTS:
            return False
    return True


def is_batch_norm(norm: nn.Module | None) -> bool:
    return type(norm) is nn.BatchNorm2d


def rms_norm(norm: nn.Module, x: torch.Tensor, act: str = "none", residual: torch.Tensor | None = None) -> torch.Tensor:
    """act(norm(x)) + residual. norm: an RMS norm that satisfies `can_fuse_norm`."""
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    return ops.rms_norm(x, weight, bias, norm.eps, act, residual, norm_dtype(norm, x))


def batch_norm(norm: nn.BatchNorm2d, x: torch.Tensor, act: str, residual: torch.Tensor | None) -> torch.Tensor:
    """act(norm(x)) + residual with the statistics of the batch, which also update the norm's running statistics."""
    channels = norm.num_features
    count = x.numel() // channels
    if count < 2 or x.shape[1] != channels or not {norm.weight.dtype, norm.bias.dtype} <= {x.dtype, torch.float32}:
        y = _activate(norm(x), act)
        return y if residual is None else y + residual
    y, mean, variance = ops.batch_norm_act(x, norm.weight, norm.bias, norm.eps, act, residual)
    _update_statistics(norm, mean, variance, count)
    return y


def _update_statistics(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Moves the running statistics of the norm towards the statistics of a batch, `count` values per channel."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # the mean of all batches
            momentum = 1 / float(norm.num_batches_tracked)
    if momentum:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)


def _activate(x: torch.Tensor, act: str) -> torch.Tensor:
    return x if act == "none" else getattr(F, act)(x)


def norm_dtype(norm: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype of norm(x).

    This project's RMS norm and the original's in Triton return x's dtype. The original's in PyTorch promotes; under
    CUDA autocast it promotes from float32, because autocast computes powers in float32. diffusers' returns the dtype
    of its weight.
    """
    name = kind(norm)
    if name != "RMSNorm" and not (name == "RMSNorm2d" and isinstance(norm, nn.LayerNorm)):
        return x.dtype
    weights = torch.promote_types(norm.weight.dtype, norm.bias.dtype)
    if name == "RMSNorm":
        return weights if norm.weight.dtype in HALVES else torch.promote_types(weights, torch.float32)
    return torch.promote_types(weights, torch.float32 if x.is_cuda and autocasts(x) else x.dtype)


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for the device of x; the meta device has no autocast."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of products with x: that of autocast, or that of x, which the weights must have then."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def can_fuse_conv(
    conv: nn.Module | None, x: torch.Tensor, residual: torch.Tensor | None = None, any_shape: bool = False
) -> bool:
    """Whether `ops.conv2d` does the work of conv(x) + residual: in inference, in half precision of one type.

    Under autocast that is autocast's type; x and the weights are cast. any_shape: ignores the number of channels of x.
    Without it the module itself raises the error for other channels.
    """
    if torch.is_grad_enabled():
        return False
    dtype = compute_dtype(x)
    return (
        dtype in HALVES
        and (residual is None or residual.dtype == dtype)
        and _has_known_parts(conv, x)
        and (any_shape or x.shape[1] == conv.in_channels)
    )


def _has_known_parts(conv: nn.Module | None, x: torch.Tensor) -> bool:
    """Whether conv(x) is a convolution with zero padding, of one group, one stride and ordinary weights of known types,
    on a device with kernels.
    """
    if type(conv) is not nn.Conv2d:
        return False
    parameters = conv._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")  # no weight: it is computed
    if weight is None or not _are_weights(weight, bias):
        return False
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        if (
            not autocasts(x)
            or weight.dtype not in KERNEL_DTYPES
            or (bias is not None and bias.dtype not in KERNEL_DTYPES)
        ):
            return False
    return (
        conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and conv.stride[0] == conv.stride[1]
        and unobserved(conv)
        and ops.has_kernels(x)
    )


def can_fuse_conv3x3(conv: nn.Module | None, x: torch.Tensor) -> bool:
    """`can_fuse_conv`, for a 3×3 convolution with padding 1 and stride 1."""
    return can_fuse_conv(conv, x) and _is_3x3(conv)


def _is_3x3(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (3, 3) and conv.padding == conv.stride == (1, 1)


def can_fuse_unshuffle(conv: nn.Module | None, x: torch.Tensor) -> bool:
    """Whether `ops.conv2d_unshuffle` computes conv(x) and a pixel-unshuffle by 2."""
    return can_fuse_conv3x3(conv, x) and conv.in_channels <= FEW_CHANNELS


def conv_unshuffle(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """conv(x) and a pixel-unshuffle by 2 in one kernel, for `can_fuse_unshuffle`."""
    dtype = compute_dtype(x)
    return ops.conv2d_unshuffle(x.to(dtype), operands.of_convolution(conv, dtype), operands.of_bias(conv, dtype))


def _convolve(
    conv: nn.Conv2d,
    x: torch.Tensor,
    act: str = "none",
    residual: torch.Tensor | None = None,
    with_bias: bool = True,
) -> torch.Tensor:
    """act(conv(x)) + residual in one kernel, for `can_fuse_conv`."""
    dtype = compute_dtype(x)
    bias = operands.of_bias(conv, dtype) if with_bias else None
    return _convolve_with(conv, x, operands.of_convolution(conv, dtype), bias, act, residual)


def _convolve_with(
    conv: nn.Conv2d,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    act: str,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """act(x * weight + bias) + residual in one kernel, in the type of the weight, with conv's stride and padding."""
    rows, columns = conv.padding
    x = x if x.dtype == weight.dtype else x.to(weight.dtype)
    return ops.conv2d(x, weight, bias, act, residual, conv.stride[0], [rows, columns, rows, columns])


def conv_without_bias(conv: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """conv(x) without its bias, and the bias. The bias is None if there is none, or if conv(x) already includes it."""
    if can_fuse_conv(conv, x):
        return _convolve(conv, x, with_bias=False), conv._parameters["bias"]
    if type(conv) is nn.Conv2d and conv.bias is not None and plain(conv):
        return convolve(conv, x, conv.weight, None), conv.bias
    return conv(x), None


def upsample_conv_without_bias(conv: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """conv(nearest-neighbour 2× up-sampling of x) without its bias, and the bias, as in `conv_without_bias`.

    The first is four planes in inference, as `ops.duplicate_shuffle_add` takes them, except for batch 0. With gradients
    it is a transposed convolution. Both compute with 4 products instead of 9. conv: 3×3 with padding 1.
    """
    if x.shape[0] > 0 and can_fuse_conv3x3(conv, x):
        dtype = compute_dtype(x)
        return ops.upsample_conv2d(x.to(dtype), operands.of_upsampling_convolution(conv, dtype)), conv.bias
    if torch.is_grad_enabled() and _has_known_parts(conv, x) and _is_3x3(conv) and x.shape[1] == conv.in_channels:
        weight = ops.transposed_weights(conv.weight, compute_dtype(x))
        return F.conv_transpose2d(x, weight, stride=2, padding=1), conv.bias
    return conv_without_bias(conv, upsample(x))


def upsample(x: torch.Tensor) -> torch.Tensor:
    """Nearest-neighbour 2× up-sampling, channels-last. PyTorch's own kernel reaches a tenth of the memory bandwidth."""
    batch, channels, height, width = x.shape
    if torch.compiler.is_compiling():  # PyTorch 2.11 cannot export the views below with dynamic sizes
        return F.interpolate(x.contiguous(memory_format=torch.channels_last), (2 * height, 2 * width))
    pixels = x.movedim(1, -1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return pixels.reshape(batch, 2 * height, 2 * width, channels).movedim(-1, 1)


def norm_act(norm: nn.Module, x: torch.Tensor, act: str, residual: torch.Tensor | None) -> torch.Tensor:
    """act(norm(x)) + residual. norm must satisfy `can_fuse_norm`."""
    if not is_batch_norm(norm):
        return rms_norm(norm, x, act, residual)
    if norm.training:
        return batch_norm(norm, x, act, residual)
    return ops.bias_act(x, norm.bias, act, residual, norm.weight, norm.running_mean, norm.running_var, norm.eps)


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module | None,
    act: str,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(norm(conv(x))) + residual in one or two passes. norm must satisfy `can_fuse_norm`."""
    fused = can_fuse_conv(conv, x, residual)
    if norm is None:
        if fused:
            return _convolve(conv, x, act, residual)
        y, bias = conv_without_bias(conv, x)
        if bias is not None:
            return ops.bias_act(y, bias, act, residual=residual)
        y = _activate(y, act)
        return y if residual is None else y + residual
    if is_batch_norm(norm):
        if norm.training:
            return batch_norm(norm, conv(x), act, residual)
        if fused and conv.bias is None:
            folded = operands.of_convolution_and_norm(conv, norm, compute_dtype(x))
            return _convolve_with(conv, x, *folded, act, residual)
    y = _convolve(conv, x) if fused or can_fuse_conv(conv, x) else conv(x)
    return norm_act(norm, y, act, residual)


def res_block(
    first: nn.Module, act: str | None, second: nn.Module, norm: nn.Module | None, x: torch.Tensor
) -> torch.Tensor | None:
    """norm(second(act(first(x)))) + x if a gradient is wanted and one operator computes this; else None.

    norm must satisfy `can_fuse_norm`.
    """
    if not torch.is_grad_enabled() or act is None or norm is None:
        return None
    if not (_can_train3x3(first, x) and _can_train3x3(second, x)):
        return None
    w1, b1, w2, scale, shift = first.weight, first.bias, second.weight, norm.weight, norm.bias
    same_widths = w1.shape[1] == w2.shape[0] == scale.shape[0] == x.shape[1] and w1.shape[0] == w2.shape[1]
    dtypes = {scale.dtype, shift.dtype} <= {x.dtype, torch.float32}
    known = same_widths and dtypes and b1 is not None and second.bias is None
    if not known or not wants_gradient(x, w1, b1, w2, scale, shift):
        return None
    if not is_batch_norm(norm):
        if norm_dtype(norm, x) != x.dtype:
            return None
        return ops.res_block(x, w1, b1, act, w2, "rms", scale, shift, norm.eps)[0]
    if not norm.training:
        folded, shift = operands.of_convolution_and_norm(second, norm, compute_dtype(x))
        return ops.res_block(x, w1, b1, act, folded, "none", None, shift)[0]
    count = x.numel() // x.shape[1]
    if count < 2:
        return None
    y, mean, variance = ops.res_block(x, w1, b1, act, w2, "batch", scale, shift, norm.eps)
    _update_statistics(norm, mean, variance, count)
    return y


def _can_train3x3(conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether conv(x) is a 3×3 convolution with padding 1 and stride 1 in x's dtype, also under autocast."""
    known = _has_known_parts(conv, x) and _is_3x3(conv)
    return known and x.dtype == compute_dtype(x) and conv.weight.dtype in (x.dtype, torch.float32)


def multiscale_qkv(scale: nn.Module, qkv: torch.Tensor) -> torch.Tensor:
    """scale(qkv), in one pass if scale is a depthwise and a grouped 1×1 convolution, as in the released models."""
    parts = list(scale._modules.values())
    one_after_the_other = type(scale) is nn.Sequential or kind(scale) == "SanaMultiscaleAttentionProjection"
    if not (one_after_the_other and [*map(type, parts)] == [nn.Conv2d] * 2 and plain(scale, *parts)):
        return scale(qkv)
    depthwise, grouped = parts
    dtype = compute_dtype(qkv)
    dtypes = {dtype, torch.float32} if autocasts(qkv) else {dtype}
    if qkv.dtype != dtype or not dtypes.issuperset((depthwise.weight.dtype, grouped.weight.dtype)):
        return scale(qkv)
    side, channels = depthwise.kernel_size[0], qkv.shape[1]
    known = (
        depthwise.bias is grouped.bias is None
        and depthwise.groups == depthwise.out_channels == grouped.out_channels == channels
        and depthwise.kernel_size == (side, side)
        and side % 2 == 1
        and depthwise.padding == (side // 2, side // 2)
        and depthwise.padding_mode == "zeros"
        and depthwise.stride == depthwise.dilation == grouped.stride == grouped.kernel_size == (1, 1)
        and grouped.padding == (0, 0)
    )
    return ops.multiscale_qkv(qkv, depthwise.weight, grouped.weight) if known else scale(qkv)


def norm_act_conv(norm: nn.Module, act: str, conv: nn.Module | None, x: torch.Tensor) -> torch.Tensor | None:
    """conv(act(norm(x))) if one operator computes it, for convolutions to few channels; else None.

    norm: an RMS norm that satisfies `can_fuse_norm`. It returns the dtype of its input, or autocast is on, which rounds
    the input of the convolution as the operator does.
    """
    few = can_fuse_conv3x3(conv, x) and conv.in_channels <= MOST_CHANNELS and conv.out_channels <= MOST_FILTERS
    dtype = compute_dtype(x)
    if not few or x.dtype != dtype:
        return None
    weight, bias = operands.of_convolution(conv, dtype), operands.of_bias(conv, dtype)
    return ops.rms_norm_conv2d(x, norm.weight, norm.bias, weight, bias, norm.eps, act)


def is_depthwise3x3(conv: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding_mode == "zeros"
        and conv.bias is not None
        and plain(conv)
    )
