"""Layers of encoders and decoders that compute in 8 bit: which can, which do, and their forwards.

A layer computes in 8 bit if it has the attribute `operands.INT8`, the factors of its input. `patch` sets it. Copies and
pickles of the layer keep it; it is no part of `state_dict`. The products of such a layer are `ops.conv2d_int8`, on a
Hopper GPU; elsewhere, with hooks, and with weights of another dtype than when it was set, the layer computes exactly.

Between blocks, images have the model's dtype. Within a block, kernels write int8 for the layer behind them. Where a
sequence knows the next block, a block's last kernel also writes a copy in int8, for the first layer of that block.
Elsewhere the first layer of a block quantises its input, in a pass of its own.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._library import HAS_TRITON, INTERPRETED, KERNEL_DTYPES, is_hopper
from dcae_fast.ops._private import unobserved

from . import fusion, operands
from .call import Coder
from .layout import Part
from .module import FastModule, check_inference, plain

MULTIPLE = 16  # of the channels and filters
Copy = list[torch.Tensor]
"""An image in 8 bit for the next block, or empty. The block pops it, so that its memory is free once it is read."""


@dataclass(frozen=True, eq=False)
class Int8:
    """What makes a layer compute in 8 bit. factor: 1 / scale of each channel of its input, [C] fp32; dtype: of its
    weight when this was set.
    """

    factor: torch.Tensor
    dtype: torch.dtype


def runs_on(device: torch.device) -> bool:
    return INTERPRETED or (HAS_TRITON and is_hopper(device))


class Block(Part):
    """A block that can read a copy of its input in 8 bit, and write a copy of its result."""

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        """The factors of the input if the block's first layer computes in 8 bit, else None. x: like the input."""
        raise NotImplementedError

    def with_copy(self, x: torch.Tensor, copy: Copy, out_factor: torch.Tensor | None) -> tuple[torch.Tensor, Copy]:
        """The result, and a copy of it if out_factor is given and the last kernel can write both.

        copy: of x, empty if `input_factor` is None.
        """
        raise NotImplementedError


def compute_with_copy(
    op: nn.Module, x: torch.Tensor, copy: Copy, following: nn.Module | None
) -> tuple[torch.Tensor, Copy]:
    """op(x), and a copy of it for the operation that follows. copy: of x, for op."""
    if not isinstance(op, Block):
        return op(x), []
    out_factor = following.input_factor(x) if isinstance(following, Block) else None
    if out_factor is not None and (x.numel() == 0 or not unobserved(following)):
        out_factor = None
    if (not copy and out_factor is None) or not unobserved(op):
        return op(x), []
    return op.with_copy(x, copy, out_factor)


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the layers of a patched model that can compute in 8 bit.

    They are inside encoders and decoders, without the first and the last layer, and without layers that have hooks or
    that several encoders and decoders share.
    """
    coders = {path: coder for path, coder in model.named_modules() if isinstance(coder, Coder)}
    uses = Counter(id(module) for coder in coders.values() for module in coder.modules())
    for path, coder in coders.items():
        ends = {id(module) for end in coder.ends for module in getattr(coder, end).modules()}
        names = {id(module): name for name, module in coder.named_modules(prefix=path)}
        for module in coder.modules():
            if isinstance(module, FastModule) and id(module) not in ends:
                own = (layer for layer in module.int8_layers() if uses[id(layer)] == 1)
                yield from ((names[id(layer)], layer) for layer in own if _can_compute(layer))


def _can_compute(layer: nn.Module) -> bool:
    if not plain(layer):
        return False
    if type(layer) is nn.Linear:
        return layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.padding) in (((1, 1), (0, 0)), ((3, 3), (1, 1)))
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and layer.in_channels % MULTIPLE == layer.out_channels % MULTIPLE == 0
    )


def mark(layer: nn.Module, scales: Sequence[float]) -> None:
    """Let a layer compute in 8 bit. scales: of the channels of its input."""
    with torch.inference_mode(False):
        factor = 1 / torch.tensor(scales, dtype=torch.float32)
        layer.__dict__[operands.INT8] = Int8(factor.to(layer.weight.device), layer.weight.dtype)


def unmark(layer: nn.Module) -> None:
    layer.__dict__.pop(operands.INT8, None)


def is_marked(*layers: nn.Module) -> bool:
    """Whether one of these layers is to compute in 8 bit, and so has no gradient."""
    for layer in layers:  # a loop without calls, since it runs in every call of a model
        if operands.INT8 in layer.__dict__:
            return True
    return False


def factor_of(layer: nn.Module | None, x: torch.Tensor) -> torch.Tensor | None:
    """The factors of a layer's input if the layer computes in 8 bit for an input like x, else None.

    x: an image of the model's dtype, or in 8 bit. Raises RuntimeError in training mode and where gradients are on.
    """
    found = None if layer is None else operands.mark_of(layer, operands.INT8)
    if found is None:
        return None
    check_inference(layer)
    dtype = _dtype(layer, x)
    fits = x.dtype in (torch.int8, dtype) or fusion.autocasts(x)
    known = layer.weight.dtype == found.dtype and dtype in KERNEL_DTYPES
    if not (fits and known and plain(layer) and runs_on(x.device)):
        return None
    return operands.of_factor(layer, found.factor)


def _dtype(layer: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype of a layer's results."""
    return fusion.compute_dtype(x) if fusion.autocasts(x) else layer.weight.dtype


def quantized(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """x in 8 bit; x itself without factors, and if x is in 8 bit already."""
    return x if factor is None or x.dtype == torch.int8 else ops.quantize(x, factor)


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module | None,
    act: str,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    out_factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fusion.conv_norm_act`, in 8 bit if the layer computes so: act(norm(conv(x))) + residual.

    x: an image, or the same in 8 bit in units of the layer's scales. out_factor: of the result in 8 bit, for the layer
    behind it; None for a result of the model's dtype.
    """
    factor = factor_of(conv, x)
    if factor is None:
        return quantized(fusion.conv_norm_act(conv, norm, act, x, residual), out_factor)
    if _folds(conv, norm):
        fits = residual is None or residual.dtype == _dtype(conv, x)
        result = _product((conv,), x, factor, norm, act, residual if fits else None, out_factor if fits else None)
        return result if fits else quantized(result + residual, out_factor)
    return quantized(fusion.norm_act(norm, _product((conv,), x, factor), act, residual), out_factor)


def with_copy(
    conv: nn.Module,
    norm: nn.Module | None,
    act: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    out_factor: torch.Tensor | None,
) -> tuple[torch.Tensor, Copy]:
    """`conv_norm_act`, and a copy of the result in 8 bit if out_factor is given and the last kernel can write both."""
    factor = None if out_factor is None else factor_of(conv, x)
    dtype = _dtype(conv, x)
    if factor is not None and residual.dtype == dtype:
        if _folds(conv, norm):
            weight, scales, bias = operands.of_int8((conv,), factor, norm)
            y, q = ops.conv2d_int8(quantized(x, factor), weight, scales, bias, act, residual, dtype, out_factor)
            return y, [q]
        if not fusion.is_batch_norm(norm):
            return norm_with_copy(norm, _product((conv,), x, factor), act, residual, out_factor)
    return conv_norm_act(conv, norm, act, x, residual), []


def norm_with_copy(
    norm: nn.Module, x: torch.Tensor, act: str, residual: torch.Tensor, out_factor: torch.Tensor | None
) -> tuple[torch.Tensor, Copy]:
    """`fusion.rms_norm`, and a copy of the result in 8 bit if out_factor is given and the kernel can write both."""
    if out_factor is None or not fusion.norm_dtype(norm, x) == x.dtype == residual.dtype:
        return fusion.rms_norm(norm, x, act, residual), []
    y, q = ops.rms_norm_int8(x, norm.weight, norm.bias, out_factor, norm.eps, act, residual)
    return y, [q]


def _folds(conv: nn.Module, norm: nn.Module | None) -> bool:
    """Whether the product also computes the norm: there is none, or a batch norm in inference."""
    return norm is None or (fusion.is_batch_norm(norm) and conv.bias is None and not norm.training)


def conv_without_bias(conv: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fusion.conv_without_bias`, in 8 bit if the layer computes so; the result then includes the bias."""
    factor = factor_of(conv, x)
    return fusion.conv_without_bias(conv, x) if factor is None else (_product((conv,), x, factor), None)


def upsample_conv_without_bias(conv: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`fusion.upsample_conv_without_bias`, in 8 bit if the layer computes so; the planes then include the bias."""
    factor = factor_of(conv, x)
    if factor is None or x.numel() == 0:
        return fusion.upsample_conv_without_bias(conv, x)
    weight, scales, bias = operands.of_int8((conv,), factor, upsamples=True)
    y, _ = ops.upsample_conv2d_int8(quantized(x, factor), weight, scales, bias, dtype=_dtype(conv, x))
    return y, None


def depthwise_glu(x: torch.Tensor, conv: nn.Conv2d, out_factor: torch.Tensor | None) -> torch.Tensor:
    """`ops.depthwise_glu` with the weights of a depthwise convolution; in 8 bit if out_factor is given."""
    parameters = conv._parameters
    weights = parameters["weight"], parameters["bias"]
    return ops.depthwise_glu(x, *weights) if out_factor is None else ops.depthwise_glu_int8(x, *weights, out_factor)


def relu_linear_attention(
    qkvs: list[torch.Tensor], head_dim: int, eps: float, out_factor: torch.Tensor | None
) -> torch.Tensor:
    """`ops.relu_linear_attention`; in 8 bit if out_factor is given."""
    if out_factor is None:
        return ops.relu_linear_attention(qkvs, head_dim, eps)
    return ops.relu_linear_attention_int8(qkvs, out_factor, head_dim, eps)


def linear(layers: tuple[nn.Linear, ...], x: torch.Tensor) -> torch.Tensor | None:
    """Linear layers of the channels of an image, one after the other along channels, if the first computes in 8 bit;
    else None. Several layers have no biases.
    """
    factor = factor_of(layers[0], x)
    return None if factor is None else _product(layers, x, factor)


def _product(
    layers: tuple[nn.Conv2d | nn.Linear, ...],
    x: torch.Tensor,
    factor: torch.Tensor,
    norm: nn.BatchNorm2d | None = None,
    act: str = "none",
    residual: torch.Tensor | None = None,
    out_factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(norm(layers(x))) + residual, in 8 bit if out_factor is given."""
    weight, scales, bias = operands.of_int8(layers, factor, norm)
    dtype = _dtype(layers[0], x) if out_factor is None else None
    y, q = ops.conv2d_int8(quantized(x, factor), weight, scales, bias, act, residual, dtype, out_factor)
    return q if y is None else y
