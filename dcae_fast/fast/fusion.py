"""Convolution, norm, activation and residual of existing modules, in as few passes as the modules allow."""

import torch
import torch.nn.functional as F
from torch import nn

from dcae_fast import ops

from .module import kind, plain

RMS_NORMS = ("RMSNorm2d", "TritonRMSNorm2d", "RMSNorm")
ACTIVATIONS = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "silu"}


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def layout_of(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x in the memory format of `like`: contiguous unless `like` is channels-last alone."""
    keep = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return x if keep else x.contiguous()


def activation_name(act: nn.Module | None) -> str | None:
    """What the kernels call this activation, None if they do not know it."""
    if act is None:
        return "none"
    return ACTIVATIONS.get(type(act)) if plain(act) else None


def can_fuse_norm(norm: nn.Module | None) -> bool:
    """No norm, a channel RMS norm with weight and bias, or a batch norm that only scales and shifts."""
    if norm is None:
        return True
    if not plain(norm) or getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
        return False
    return kind(norm) in RMS_NORMS or (type(norm) is nn.BatchNorm2d and not norm.training and norm.track_running_stats)


def conv_without_bias(conv: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """conv(x) and the bias that is still to be added; None if there is none or the convolution is no plain Conv2d."""
    if type(conv) is nn.Conv2d and conv.bias is not None and plain(conv):
        return conv._conv_forward(x, conv.weight, None), conv.bias
    return conv(x), None


def can_use_cudnn_relu(conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether cuDNN can add bias and ReLU to the convolution for free: half precision inference, uncompiled."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and type(conv) is nn.Conv2d
        and conv.bias is not None
        and conv.weight.dtype == conv.bias.dtype == x.dtype
        and conv.padding_mode == "zeros"
        and conv.in_channels % 8 == conv.out_channels % 8 == 0
        and x.numel() > 0
        and plain(conv)
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling())
        and torch.backends.cudnn.is_available()
    )


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module | None,
    act: str,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    norm_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act(norm(conv(x))) + residual, one pass after the convolution. norm must satisfy `can_fuse_norm`.

    norm_dtype: type of an RMS norm's result, where the original's is not its input's.
    """
    if norm is None:
        if residual is None and act == "relu" and can_use_cudnn_relu(conv, x):
            return torch.cudnn_convolution_relu(
                x, channels_last(conv.weight), conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
            )
        y, bias = conv_without_bias(conv, x)
        if bias is not None:
            return ops.bias_act(y, bias, act, residual=residual)
        y = y if act == "none" else getattr(F, act)(y)
        return y if residual is None else y + residual
    y = conv(x)
    if type(norm) is nn.BatchNorm2d:
        mean, variance = norm.running_mean, norm.running_var
        return ops.bias_act(y, norm.bias, act, residual, norm.weight, mean, variance, norm.eps)
    return ops.rms_norm(y, norm.weight, norm.bias, norm.eps, act, residual, norm_dtype)


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
