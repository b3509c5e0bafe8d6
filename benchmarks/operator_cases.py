"""The operators that are benchmarked: each with its reference and random tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcae_fast import ops
from dcae_fast.fast.fusion import conv_norm_act
from dcae_fast.ops.batch_norm_act import (
    batch_norm_act_backward_op,
    batch_norm_act_backward_reference,
    batch_norm_act_reference,
)
from dcae_fast.ops.bias_act import bias_act_backward_op, bias_act_backward_reference, bias_act_reference
from dcae_fast.ops.concatenate import concatenate_reference
from dcae_fast.ops.conv2d_unshuffle import conv2d_unshuffle_reference
from dcae_fast.ops.depthwise_glu import depthwise_glu_reference
from dcae_fast.ops.feature_distance import (
    feature_distance_backward_op,
    feature_distance_backward_reference,
    feature_distance_reference,
)
from dcae_fast.ops.gated_sum import gated_sum_reference
from dcae_fast.ops.layer_norm import layer_norm_backward_op, layer_norm_backward_reference
from dcae_fast.ops.linear import linear_gelu_reference, linear_reference
from dcae_fast.ops.mlp import mlp_reference
from dcae_fast.ops.multiscale_qkv import (
    multiscale_qkv_backward_op,
    multiscale_qkv_backward_reference,
    multiscale_qkv_reference,
)
from dcae_fast.ops.quantize import quantize_reference
from dcae_fast.ops.relu_linear_attention import relu_linear_attention_reference
from dcae_fast.ops.rms_norm import rms_norm_reference
from dcae_fast.ops.rms_norm_conv2d import rms_norm_conv2d_reference
from dcae_fast.ops.shuffle import duplicate_shuffle_add_reference, to_planes, unshuffle_average_add_reference

Shape = tuple[int, int, int, int]
SDPA = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Case:
    """op, reference: functions of the tensors. flops: set if arithmetic limits the speed, 0 if bandwidth does.

    peak: of the products, over the peak in bf16.
    """

    op: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    tensors: list[torch.Tensor]
    flops: float = 0
    peak: float = 1


def rms_norm(random, b, c, h, w) -> Case:
    return Case(
        lambda x, weight, bias, residual: ops.rms_norm(x, weight, bias, residual=residual),
        lambda x, weight, bias, residual: rms_norm_reference(x, weight, bias, 1e-5, "none", residual, x.dtype),
        [random(b, c, h, w), random(c), random(c), random(b, c, h, w)],
    )


def bias_act(random, b, c, h, w) -> Case:
    return Case(
        lambda x, bias: ops.bias_act(x, bias, "silu"),
        lambda x, bias: bias_act_reference(x, bias, "silu", None, None, None, 0.0, None, x.dtype),
        [random(b, c, h, w), random(c)],
    )


def bias_act_gradient(random, b, c, h, w) -> Case:
    constants = "silu", None, None, None, 0.0
    return Case(
        lambda *tensors: bias_act_backward_op(*tensors, *constants)[0],
        lambda *tensors: bias_act_backward_reference(*tensors, *constants)[0],
        [random(b, c, h, w), random(b, c, h, w), random(c)],
    )


def feature_distance(random, b, c, h, w) -> Case:
    return Case(ops.feature_distance, feature_distance_reference, [random(b, c, h, w), random(b, c, h, w), random(c)])


def feature_distance_gradient(random, b, c, h, w) -> Case:
    one = torch.ones((), device=random(1).device)
    return Case(
        lambda *tensors: feature_distance_backward_op(one, *tensors, 1e-8),
        lambda *tensors: feature_distance_backward_reference(one, *tensors, 1e-8),
        [random(b, c, h, w), random(b, c, h, w), random(c)],
    )


def batch_norm_act(random, b, c, h, w) -> Case:
    return Case(
        lambda x, scale, bias, residual: ops.batch_norm_act(x, scale, bias, residual=residual)[0],
        lambda x, scale, bias, residual: batch_norm_act_reference(x, scale, bias, 1e-5, "none", residual, x.dtype)[0],
        [random(b, c, h, w), random(c), random(c), random(b, c, h, w)],
    )


def batch_norm_act_gradient(random, b, c, h, w) -> Case:
    dy, x, scale, bias = random(b, c, h, w), random(b, c, h, w), random(c), random(c)
    variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    return Case(
        lambda *tensors: batch_norm_act_backward_op(*tensors, 1e-5, "none")[0],
        lambda *tensors: batch_norm_act_backward_reference(*tensors, 1e-5, "none")[0],
        [dy, x, scale, bias, mean, variance],
    )


def relu_linear_attention(random, b, c, h, w) -> Case:
    return Case(
        lambda qkv: ops.relu_linear_attention([qkv]),
        lambda qkv: relu_linear_attention_reference([qkv], 32, 1e-15),
        [random(b, c, h, w)],
    )


def depthwise_glu(random, b, c, h, w) -> Case:
    return Case(ops.depthwise_glu, depthwise_glu_reference, [random(b, c, h, w), random(c, 1, 3, 3), random(c)])


def unshuffle_average_add(random, b, c, h, w) -> Case:
    return Case(
        ops.unshuffle_average_add,
        lambda x, main, bias: unshuffle_average_add_reference(x, main, bias, 2 * c, 2, 0.5),
        [random(b, c, h, w), random(b, c // 2, h, w), random(c // 2)],
    )


def duplicate_shuffle_add(random, b, c, h, w) -> Case:
    return Case(
        ops.duplicate_shuffle_add,
        lambda x, main, bias: duplicate_shuffle_add_reference(x, main, bias, c // 2, 2, 1.0),
        [random(b, c, h, w), random(b, 2 * c, h, w), random(2 * c)],
    )


def multiscale_qkv(random, b, c, h, w) -> Case:
    weights = [random(c, 1, 5, 5) / 5, random(c, 32, 1, 1) / 32**0.5]
    return Case(ops.multiscale_qkv, multiscale_qkv_reference, [random(b, c, h, w), *weights])


def multiscale_qkv_gradient(random, b, c, h, w) -> Case:
    return Case(
        lambda *tensors: multiscale_qkv_backward_op(*tensors, True)[0],
        lambda *tensors: multiscale_qkv_backward_reference(*tensors, True)[0],
        [random(b, c, h, w), *multiscale_qkv(random, b, c, h, w).tensors],
    )


def packed_attention(random, b, c, h, w, gradient: bool = False) -> Case:
    """The reference is the fastest backend of scaled_dot_product_attention. gradient: time forward and backward."""
    dim = 72 if c % (3 * 72) == 0 else 32
    heads, tokens = c // (3 * dim), h * w

    def sdpa(qkv):
        q, k, v = qkv.view(b, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(SDPA, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def ours(qkv):
        return ops.packed_attention(qkv, heads)

    def with_gradient(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(qkv, dout):
            with torch.inference_mode(False), torch.enable_grad():
                leaf = qkv.detach().requires_grad_()
                return torch.autograd.grad(attention(leaf), leaf, dout)[0]

        return run

    tensors = [random(b, tokens, c)] + [random(b, tokens, c // 3)] * gradient
    return Case(with_gradient(ours), with_gradient(sdpa), tensors) if gradient else Case(ours, sdpa, tensors)


def concatenate(random, b, c, h, w) -> Case:
    """The inputs are a residual stream in fp32, as in UViT's long skip connections."""
    return Case(
        lambda left, right: ops.concatenate(left, right, torch.bfloat16),
        lambda left, right: concatenate_reference(left, right, torch.bfloat16),
        [random(b, h * w, c).float() for _ in range(2)],
    )


def gated_sum(random, b, c, h, w) -> Case:
    shape = (b, h * w, c)
    return Case(ops.gated_sum, gated_sum_reference, [random(*shape), random(b, c), random(*shape)])


def layer_norm_gradient(random, b, c, h, w) -> Case:
    """The gradient of the norm of an fp32 residual stream, added to the gradient of the stream."""
    shape, constants = (b, h * w, c), (None, None, 1e-6, torch.float32)
    return Case(
        lambda *tensors: layer_norm_backward_op(*tensors, *constants)[0],
        lambda *tensors: layer_norm_backward_reference(*tensors, *constants)[0],
        [random(*shape), random(*shape).float(), random(*shape).float(), random(c).float()],
    )


def upsample_conv2d(random, b, c, h, w) -> Case:
    weight = random(c // 2, c, 3, 3) / (3 * c**0.5)
    flops = 4 * 2 * 4 * b * h * w * c * c // 2  # a 2×2 convolution for each of the four output parities
    return Case(
        lambda x, weight: ops.upsample_conv2d(x, ops.subpixel_weights(weight)),
        lambda x, weight: to_planes(F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)),
        [random(b, c, h, w), weight],
        flops,
    )


def conv2d_unshuffle(random, b, c, h, w) -> Case:
    weight, bias = random(64, c, 3, 3) / (3 * c**0.5), random(64)
    return Case(ops.conv2d_unshuffle, conv2d_unshuffle_reference, [random(b, c, h, w), weight, bias])


def rms_norm_conv2d(random, b, c, h, w) -> Case:
    weight, bias = random(12, c, 3, 3) / (3 * c**0.5), random(12)
    return Case(
        lambda x, g, shift, weight, bias: ops.rms_norm_conv2d(x, g, shift, weight, bias, 1e-5, "relu"),
        lambda x, g, shift, weight, bias: rms_norm_conv2d_reference(x, g, shift, 1e-5, "relu", weight, bias),
        [random(b, c, h, w), random(c), random(c), weight, bias],
    )


def linear(random, b, c, h, w, out: float, act: str = "none", residual: bool = False) -> Case:
    """A linear layer to out · C channels on B·H·W tokens. It has a bias only with a residual or an activation."""
    rows, width = b * h * w, round(out * c)
    tensors = [random(rows, c), random(width, c) / c**0.5]
    tensors += [random(width)] if residual or act != "none" else []
    tensors += [random(rows, width)] if residual else []

    def reference(x, weight, bias=None, residual=None):
        if act == "none":
            return linear_reference(x, weight, bias, residual)
        return linear_gelu_reference(x, weight, bias, act)

    return Case(lambda *args: ops.linear(*args, act=act), reference, tensors, flops=2 * rows * c * width)


def mlp(random, b, c, h, w) -> Case:
    rows = b * h * w
    return Case(
        ops.mlp,
        lambda *args: mlp_reference(*args, "gelu")[0],
        [
            *(random(rows, c), random(4 * c, c) / c**0.5, random(4 * c)),
            *(random(c, 4 * c) / (4 * c) ** 0.5, random(c), random(rows, c)),
        ],
        flops=2 * 2 * rows * c * 4 * c,
    )


def convolution(random, b, c, h, w, act: str = "none", residual: bool = False) -> Case:
    """A convolution as a patched block calls it. Its weight is not in `tensors`, and so not in the memory traffic."""
    conv = nn.Conv2d(c, c, 3, padding=1, device="meta")
    weight, bias = random(c, c, 3, 3) / (3 * c**0.5), random(c)
    conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)

    def reference(x, residual=None):
        y = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)
        y = F.silu(y) if act == "silu" else y
        return y if residual is None else y + residual

    return Case(
        lambda x, residual=None: conv_norm_act(conv, None, act, x, residual),
        reference,
        [random(b, c, h, w) for _ in range(1 + residual)],
        flops=2 * 9 * b * h * w * c**2,
    )


def int8_convolution(
    random, b, c, h, w, out: float = 1, side: int = 3, act: str = "none", residual: bool = False
) -> Case:
    """An 8-bit convolution to out · C channels that writes bf16, with a residual also int8.

    The reference is the fastest convolution in bf16. The tensors hold integers, times a power of two for the weight, so
    that both compute with the same numbers.
    """
    planes, filters = 4 if side == 2 else 1, round(out * c)
    weight, scale = _integers(random(planes * filters, c, side, side)), 0.5 ** round(math.log2(42**2 * side * c**0.5))
    tensors = [_integers(random(b, c, h, w)), weight * scale, *([random(filters)] if act != "none" or residual else [])]
    tensors += [random(b, filters, h, w)] if residual else []
    x8, weight8 = tensors[0].to(torch.int8), weight.to(torch.int8)
    scales = torch.full((planes * filters,), scale, device=x8.device)
    out_factor = out_factors(filters, x8) if residual else None

    def op(x, weight, bias=None, residual=None):
        convolve = ops.upsample_conv2d_int8 if side == 2 else ops.conv2d_int8
        return convolve(x8, weight8, scales, bias, act, residual, out_factor=out_factor)[0]

    def reference(x, weight, bias=None, residual=None):
        if side == 2:
            return ops.upsample_conv2d(x, weight)
        return ops.conv2d(x, weight, bias, act, residual, padding=side // 2)

    return Case(op, reference, tensors, flops=2 * x8.numel() // c * weight.numel(), peak=2)


def _integers(x: torch.Tensor) -> torch.Tensor:
    return (42 * x).round().clamp(-127, 127)


def out_factors(channels: int, like: torch.Tensor) -> torch.Tensor:
    """1 / scale of the channels of results in int8."""
    return torch.full((channels,), 32.0, device=like.device)


def to_int8(plain: Case, channels: int, op: Callable[..., torch.Tensor]) -> Case:
    """An operator that writes int8. The reference quantises the result of the operator without int8.

    channels: of the result. op: takes the tensors, then the factors of the channels.
    """
    factor = out_factors(channels, plain.tensors[0])
    return Case(
        lambda *tensors: op(*tensors, factor), lambda *tensors: ops.quantize(plain.op(*tensors), factor), plain.tensors
    )


def int8_rms_norm(random, b, c, h, w) -> Case:
    return to_int8(
        rms_norm(random, b, c, h, w),
        c,
        lambda x, weight, bias, residual, factor: ops.rms_norm_int8(x, weight, bias, factor, residual=residual)[1],
    )


def int8_attention(random, b, c, h, w) -> Case:
    plain = relu_linear_attention(random, b, c, h, w)
    return to_int8(plain, c // 3, lambda qkv, factor: ops.relu_linear_attention_int8([qkv], factor))


def int8_depthwise_glu(random, b, c, h, w) -> Case:
    return to_int8(depthwise_glu(random, b, c, h, w), c // 2, ops.depthwise_glu_int8)


def int8_average(random, b, c, h, w) -> Case:
    plain = unshuffle_average_add(random, b, c, h, w)
    return to_int8(plain, 2 * c, lambda *args: ops.unshuffle_average_add_int8(*args)[1])


def int8_duplicate(random, b, c, h, w) -> Case:
    plain = duplicate_shuffle_add(random, b, c, h, w)
    return to_int8(plain, c // 2, lambda *args: ops.duplicate_shuffle_add_int8(*args)[1])


def quantize(random, b, c, h, w) -> Case:
    x = random(b, c, h, w)
    factor = out_factors(c, x)
    return Case(lambda x: ops.quantize(x, factor), lambda x: quantize_reference(x, factor), [x])


CASES: dict[str, Callable[..., Case]] = {
    "conv3x3 + bias + silu": lambda *args: convolution(*args, act="silu"),
    "conv3x3 + bias + residual": lambda *args: convolution(*args, residual=True),
    "int8 conv3x3 + bias + silu": lambda *args: int8_convolution(*args, act="silu"),
    "int8 conv3x3 + bias + residual": lambda *args: int8_convolution(*args, residual=True),
    "int8 conv1x1 to 8C + bias + silu": lambda *args: int8_convolution(*args, out=8, side=1, act="silu"),
    "int8 upsample_conv2d": lambda *args: int8_convolution(*args, out=1 / 2, side=2),
    "quantize": quantize,
    "int8 rms_norm": int8_rms_norm,
    "int8 relu_linear_attention": int8_attention,
    "int8 depthwise_glu": int8_depthwise_glu,
    "int8 unshuffle_average_add": int8_average,
    "int8 duplicate_shuffle_add": int8_duplicate,
    "upsample_conv2d": upsample_conv2d,
    "conv2d_unshuffle": conv2d_unshuffle,
    "rms_norm_conv2d": rms_norm_conv2d,
    "rms_norm": rms_norm,
    "bias_act": bias_act,
    "bias_act gradient": bias_act_gradient,
    "batch_norm_act + residual": batch_norm_act,
    "batch_norm_act gradient": batch_norm_act_gradient,
    "feature_distance": feature_distance,
    "feature_distance gradient": feature_distance_gradient,
    "relu_linear_attention": relu_linear_attention,
    "multiscale_qkv": multiscale_qkv,
    "multiscale_qkv gradient": multiscale_qkv_gradient,
    "packed_attention": packed_attention,
    "packed_attention + gradient": lambda *args: packed_attention(*args, gradient=True),
    "concatenate": concatenate,
    "layer_norm gradient": layer_norm_gradient,
    "gated_sum": gated_sum,
    "depthwise_glu": depthwise_glu,
    "unshuffle_average_add": unshuffle_average_add,
    "duplicate_shuffle_add": duplicate_shuffle_add,
    "linear to q, k, v": lambda *args: linear(*args, out=3),
    "linear + residual": lambda *args: linear(*args, out=1, residual=True),
    "linear to 4C + gelu": lambda *args: linear(*args, out=4, act="gelu"),
    "linear from 4C + residual": lambda *args: linear(*args, out=1 / 4, residual=True),
    "mlp + residual": mlp,
}


def case(name: str, shape: Shape, device: torch.device) -> Case:
    """The operator with random channels-last bf16 tensors. shape: of the main input."""

    def random(*size: int) -> torch.Tensor:
        x = torch.randn(size, device=device, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 else x

    return CASES[name](random, *shape)
