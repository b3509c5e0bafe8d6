"""Fast forwards for this project's DC-AE and the original DC-Gen / efficientvit one, which share attribute names."""

import torch
from torch import nn

from dcae_fast import ops

from .coder import Coder, channels_last_for_kernels
from .fusion import (
    activation_name,
    can_fuse_norm,
    can_fuse_unshuffle,
    channels_last,
    conv_norm_act,
    conv_without_bias,
    is_depthwise3x3,
    layout_of,
    multiscale_qkv,
    norm_act_conv,
    upsample,
    upsample_conv_without_bias,
)
from .graphs import Result
from .layers import Layer, Survey, UnknownModule
from .module import FastModule, kind, plain

IDENTITIES = ("Identity", "IdentityLayer")
AVERAGING = ("PixelUnshuffleChannelAveragingDownSampleLayer",)
DUPLICATING = ("ChannelDuplicatingPixelShuffleUpSampleLayer", "ChannelDuplicatingPixelUnshuffleUpSampleLayer")


class Stages(Coder):
    """Encoder or decoder: channels-last inside, the caller's memory format outside."""

    def fast_forward(self, x: torch.Tensor, *args, **kwargs) -> Result:
        out = self.eager(channels_last(x), *args, **kwargs)
        if isinstance(out, torch.Tensor):
            return layout_of(out, x)
        return [layout_of(part, x) for part in out]


class Encoder(Stages):
    def has_layers(self, *args, **kwargs) -> bool:
        return _all_none(args, kwargs) or hasattr(self, "partial_latents")

    def layers(self, survey: Survey) -> list[Layer]:
        def stem(x: torch.Tensor) -> torch.Tensor:
            return self.project_in(channels_last_for_kernels(x))

        return [survey.sampler(self.project_in, self.project_in, stem), *survey.blocks(self.stages)]

    def finish(self, x: torch.Tensor, *args, **kwargs) -> Result:
        return self.project_out(x) if _all_none(args, kwargs) else self.partial_latents(x, *args, **kwargs)


def _all_none(args: tuple, kwargs: dict) -> bool:
    return all(value is None for value in (*args, *kwargs.values()))


class Decoder(Stages):
    def enlargement(self) -> int:
        return 2 ** (len(self.stages) - 1)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return self.project_in(channels_last_for_kernels(x))

    def layers(self, survey: Survey) -> list[Layer]:
        head = self.project_out
        if kind(head) != "OpSequential" or len(head.op_list) != 3:
            raise UnknownModule(type(head).__name__)
        return [*survey.blocks(reversed(self.stages)), survey.head(head, head, *head.op_list)]


class RMSNorm2d(FastModule):
    operators = ("rms_norm",)

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None or self.bias is None:
            return self.eager(x)
        return ops.rms_norm(x, self.weight, self.bias, self.eps)


class ConvLayer(FastModule):
    """Convolution, norm, activation: all but the convolution in one pass."""

    operators = ("bias_act", "conv2d", "rms_norm")

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, None)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        act = activation_name(self.act)
        if act is None or getattr(self, "dropout", None) is not None or not can_fuse_norm(self.norm):
            y = self.eager(x)
            return y if residual is None else y + residual
        return conv_norm_act(self.conv, self.norm, act, x, residual)

    def without_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This layer without its convolution's bias, and that bias, for a later pass; None if it is in already."""
        return conv_without_bias(self.conv, x) if self.is_bare() else (self(x), None)

    def is_bare(self) -> bool:
        return self.norm is None and self.act is None and getattr(self, "dropout", None) is None


def bare_conv(layer: nn.Module) -> nn.Module | None:
    """The convolution that is all there is to a layer; None if there is more."""
    return layer.conv if isinstance(layer, ConvLayer) and plain(layer) and layer.is_bare() else None


class OpSequential(FastModule):
    """The operations one after the other; an RMS norm takes along the activation and a small convolution behind it."""

    operators = ("rms_norm", "rms_norm_conv2d")

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        rest = list(self.op_list)
        while rest:
            op = rest.pop(0)
            act = activation_name(rest[0]) if rest and isinstance(op, RMSNorm2d) and can_fuse_norm(op) else None
            if act is None:
                x = op(x)
                continue
            y = self._norm_act_conv(op, act, rest[1], x) if len(rest) > 1 else None
            x, rest = (y, rest[2:]) if y is not None else (ops.rms_norm(x, op.weight, op.bias, op.eps, act), rest[1:])
        return x

    def _norm_act_conv(self, norm: nn.Module, act: str, head: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """head(act(norm(x))) where the norm and the head's convolution are one operator; else None."""
        if isinstance(head, PixelShuffleSampler) and plain(head):
            y = norm_act_conv(norm, act, bare_conv(head.conv), x)
            return None if y is None else head.shuffle(y, None)
        return norm_act_conv(norm, act, bare_conv(head), x)


class Branch(FastModule):
    """A residual branch whose last layer can add the residual."""

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, None)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        x, last = self.body(x), self.last_layer()
        if residual is None:
            return last(x)
        return last.add(x, residual) if isinstance(last, ConvLayer) and plain(last) else last(x) + residual


class ResBlock(Branch):
    operators = ConvLayer.operators

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(x)

    def last_layer(self) -> nn.Module:
        return self.conv2


class GLUMBConv(Branch):
    operators = (*ConvLayer.operators, "depthwise_glu")

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x, depth = self.inverted_conv(x), self.depth_conv
        bare = isinstance(depth, ConvLayer) and plain(depth) and depth.is_bare()
        if bare and is_depthwise3x3(depth.conv) and activation_name(self.glu_act) == "silu":
            return ops.depthwise_glu(x, depth.conv.weight, depth.conv.bias)
        value, gate = depth(x).chunk(2, dim=1)
        return value * self.glu_act(gate)

    def last_layer(self) -> nn.Module:
        return self.point_conv


class LiteMLA(Branch):
    operators = (*ConvLayer.operators, "multiscale_qkv", "relu_linear_attention")

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        normalised = getattr(self, "norm_qk", False) or getattr(self, "norm_q", None) is not None
        kernel = getattr(self, "kernel_func", None)
        if normalised or (kernel is not None and activation_name(kernel) != "relu"):
            y = self.eager(x)
            return y if residual is None else y + residual
        return super().add(x, residual)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x)
        scales = [multiscale_qkv(scale, scale[0], scale[1], qkv) for scale in self.aggreg]
        return ops.relu_linear_attention([qkv, *scales], self.dim, self.eps)

    def last_layer(self) -> nn.Module:
        return self.proj


class PixelShuffleSampler(FastModule):
    """3×3 convolution and pixel (un)shuffle: the bias goes along with the shuffle, or both with the convolution."""

    operators = ("conv2d", "conv2d_unshuffle", "unshuffle_average_add", "duplicate_shuffle_add")

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        conv = bare_conv(self.conv)
        if "Unshuffle" in kind(self) and self.factor == 2 and can_fuse_unshuffle(conv, x):
            return ops.conv2d_unshuffle(x, conv.weight, conv.bias)
        return self.shuffle(*self.without_bias(x))

    def shuffle(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        move = ops.unshuffle_average_add if "Unshuffle" in kind(self) else ops.duplicate_shuffle_add
        return move(None, x, bias, self.factor)

    def without_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution before its bias and the shuffle, and the bias if it is still to be added."""
        if isinstance(self.conv, ConvLayer) and plain(self.conv):
            return self.conv.without_bias(x)
        return self.conv(x), None


class InterpolateSampler(FastModule):
    """Nearest-neighbour up-sampling and 3×3 convolution."""

    operators = (*ConvLayer.operators, "upsample_conv2d")

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(upsample(x)) if self.is_known() else self.eager(x)

    def without_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `ops.duplicate_shuffle_add` takes: the result or its planes before the bias, and the bias."""
        conv = bare_conv(self.conv)
        if self.is_known() and conv is not None:
            return upsample_conv_without_bias(conv, x)
        return self(x), None

    def is_known(self) -> bool:
        return self.factor == 2 and getattr(self, "mode", "nearest") == "nearest"


class ResidualBlock(FastModule):
    """main(x) + shortcut(x), added by the last kernel of main, or by the kernel of the shortcut."""

    operators = ("unshuffle_average_add", "duplicate_shuffle_add")

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        main, shortcut = self.main, self.shortcut
        extra = getattr(self, "pre_norm", None) is not None or getattr(self, "post_act", None) is not None
        if extra or main is None or shortcut is None or not plain(shortcut):
            return self.eager(x)
        name = kind(shortcut)
        if name in IDENTITIES and isinstance(main, Branch) and plain(main):
            return main.add(x, x)
        if name in AVERAGING or name in DUPLICATING:
            add = ops.unshuffle_average_add if name in AVERAGING else ops.duplicate_shuffle_add
            return add(x, *self._main_without_bias(x), shortcut.factor)
        return self.eager(x)

    def _main_without_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(self.main, (PixelShuffleSampler, InterpolateSampler, ConvLayer)) and plain(self.main):
            return self.main.without_bias(x)
        return self.main(x), None
