"""This project's DC-AE and the original of DC-Gen and efficientvit, whose modules have the same attributes."""

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._private import unobserved

from .. import int8
from ..call import Coder
from ..fusion import (
    activation_name,
    can_fuse_norm,
    can_fuse_unshuffle,
    conv_unshuffle,
    is_depthwise3x3,
    is_divisible,
    multiscale_qkv,
    norm_act_conv,
    res_block,
    rms_norm,
    unknown_activation,
    unknown_norm,
    upsample,
)
from ..graphs import Result
from ..layers import Layer, Survey, UnknownModule
from ..layout import Part
from ..module import kind, member
from ..registry import register
from .dcae_layers import (
    AVERAGING,
    DUPLICATING,
    IDENTITIES,
    SHORTCUTS,
    describe_efficientvit_block,
    layer_of,
    resampling,
)


class Encoder(Coder):
    attributes = ("project_in", "stages", "project_out")
    ends = ("project_in", "project_out")

    def has_layers(self, *args, **kwargs) -> bool:
        return _all_none(args, kwargs) or hasattr(self, "partial_latents")

    def layers(self, survey: Survey) -> list[Layer]:
        def stem(x: torch.Tensor) -> torch.Tensor:
            return self.project_in(self.as_layers_see(x))

        return [survey.sampler(resampling(self.project_in), self.project_in, stem), *survey.blocks(self.stages)]

    def finish(self, x: torch.Tensor, *args, **kwargs) -> Result:
        return self.project_out(x) if _all_none(args, kwargs) else self.partial_latents(x, *args, **kwargs)


def _all_none(args: tuple, kwargs: dict) -> bool:
    return all(value is None for value in (*args, *kwargs.values()))


class Decoder(Coder):
    attributes = ("project_in", "stages", "project_out")
    ends = ("project_in", "project_out")

    def eager(self, *args, **kwargs) -> Result:
        """The decoder's own forward; for the list that an encoder returns for several numbers of channels, a list."""
        if len(args) == 1 and not kwargs and isinstance(args[0], list):
            return [self.dispatch(z) for z in args[0]]
        return super().eager(*args, **kwargs)

    def enlargement(self) -> int:
        return 2 ** (len(self.stages) - 1)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return self.as_layers_see(self.project_in(self.as_layers_see(x)))

    def layers(self, survey: Survey) -> list[Layer]:
        head = self.project_out
        if kind(head) != "OpSequential" or len(head.op_list) != 3:
            raise UnknownModule(type(head).__name__)
        norm, act, last = head.op_list
        return [*survey.blocks(reversed(self.stages)), survey.head(head, head, norm, act, resampling(last), last)]


class RMSNorm2d(Part):
    operators = ("rms_norm",)
    attributes = ("weight", "bias", "eps")

    @staticmethod
    def reason_not_fast(norm: nn.Module) -> str:
        return "it has no weight or no bias" if norm.weight is None or norm.bias is None else ""

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reason_not_fast(self):
            return self.eager(x)
        return rms_norm(self, x)


class ConvLayer(Part):
    """Convolution, norm and activation, in one or two passes."""

    operators = ("batch_norm_act", "bias_act", "conv2d", "rms_norm")
    attributes = ("conv", "norm", "act")
    optional = ("dropout",)

    @staticmethod
    def reason_not_fast(layer: nn.Module) -> str:
        if member(layer, "dropout") is not None:
            return "it has dropout"
        return unknown_activation(layer.act) or unknown_norm(layer.norm)

    def int8_layers(self) -> tuple[nn.Module, ...]:
        return (self.conv,)

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, None)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor | None, out_factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's result + residual. x may be in 8 bit if `input_factor` is not None; out_factor: for 8 bit."""
        modules, act = self._modules, self.known_activation()  # faster than attributes; a layer may be missing
        if act is None:
            y = self.eager(x)
            return int8.quantized(y if residual is None else y + residual, out_factor)
        return int8.conv_norm_act(modules["conv"], modules.get("norm"), act, x, residual, out_factor)

    def with_copy(
        self, x: torch.Tensor, residual: torch.Tensor, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        """`add`, and `int8.with_copy`."""
        modules, act = self._modules, self.known_activation()
        if act is None or out_factor is None:
            return self.add(x, residual), []
        return int8.with_copy(modules["conv"], modules.get("norm"), act, x, residual, out_factor)

    def known_activation(self) -> str | None:
        """The activation's name; None if the layer takes its own forward."""
        modules = self._modules
        known = modules.get("dropout") is None and can_fuse_norm(modules.get("norm"))
        return activation_name(modules.get("act")) if known else None

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        """The factors of the layer's input if the layer computes in 8 bit, else None. x: as in `int8.factor_of`."""
        factor = int8.factor_of(self._modules["conv"], x)
        return None if factor is None or self.known_activation() is None else factor

    def without_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer without the bias of its convolution, and the bias, as in `fusion.conv_without_bias`."""
        return int8.conv_without_bias(self.conv, x) if self.is_bare() else (self(x), None)

    def is_bare(self) -> bool:
        modules = self._modules
        return modules.get("norm") is modules.get("act") is modules.get("dropout") is None


def compute(layer: nn.Module, x: torch.Tensor, out_factor: torch.Tensor | None = None) -> torch.Tensor:
    """layer(x), in 8 bit if out_factor is given. A plain ConvLayer is not called, since a call of a module takes longer
    than its checks.
    """
    if isinstance(layer, ConvLayer) and unobserved(layer):
        return layer.add(x, None, out_factor)
    return int8.quantized(layer(x), out_factor)


def bare_conv(layer: nn.Module) -> nn.Module | None:
    """The convolution of a layer that consists of nothing else; else None."""
    return layer._modules["conv"] if isinstance(layer, ConvLayer) and unobserved(layer) and layer.is_bare() else None


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer is a plain, fast ConvLayer without dropout."""
    return isinstance(layer, ConvLayer) and unobserved(layer) and layer._modules.get("dropout") is None


class OpSequential(Part):
    """Operations in sequence. An RMS norm, the activation and a small convolution behind it are one operator."""

    operators = ("rms_norm", "rms_norm_conv2d")
    attributes = ("op_list",)

    @staticmethod
    def rests_on(sequence: nn.Module) -> dict[str, nn.Module]:
        return {name: module for name, module in sequence.named_modules() if name not in ("", "op_list")}

    @staticmethod
    def describe(sequence: nn.Module, survey: Survey) -> list[Layer]:
        return survey.blocks(sequence.op_list)

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        rest, copy = [part for op in self._modules["op_list"] for part in parts_in_sequence(op)], []
        while rest:
            op = rest.pop(0)
            act = activation_name(rest[0]) if rest and isinstance(op, RMSNorm2d) and can_fuse_norm(op) else None
            if act is None:
                x, copy = int8.compute_with_copy(op, x, copy, rest[0] if rest else None)
                continue
            y = self._norm_act_conv(op, act, rest[1], x) if len(rest) > 1 else None
            x, rest = (y, rest[2:]) if y is not None else (rms_norm(op, x, act), rest[1:])
        return x

    def _norm_act_conv(self, norm: nn.Module, act: str, head: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """head(act(norm(x))) if one operator computes norm and convolution; else None."""
        if isinstance(head, PixelShuffleSampler) and unobserved(head):
            y = norm_act_conv(norm, act, bare_conv(head.conv), x)
            return None if y is None else head.shuffle(y, None)
        return norm_act_conv(norm, act, bare_conv(head), x)


def parts_in_sequence(op: nn.Module) -> list[nn.Module]:
    """The blocks that an EfficientViTBlock consists of, or op itself."""
    if kind(op) == "EfficientViTBlock" and unobserved(op):
        return [op._modules["context_module"], op._modules["local_module"]]
    return [op]


class Branch(Part):
    """A residual branch. Its last layer can add the residual.

    body(x, out_factor): the layers before the last one, in 8 bit if out_factor is given.
    """

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.add(x, None)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        last = self.last_layer()
        known = isinstance(last, ConvLayer) and unobserved(last)
        x = self.body(x, last.input_factor(x) if known else None)
        if known:
            return last.add(x, residual)
        return last(x) if residual is None else last(x) + residual

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        """add(x, x), and a copy of it in 8 bit if its last kernel can write both. copy: of x in 8 bit."""
        last = self.last_layer()
        if not isinstance(last, ConvLayer) or not unobserved(last):
            return self.add(x, x), []
        y = self.body(copy.pop() if copy else x, last.input_factor(x))
        return last.with_copy(y, x, out_factor)


class ResBlock(Branch):
    """If a gradient is wanted, one operator computes the branch and adds the residual."""

    operators = (*ConvLayer.operators, "res_block")
    attributes = ("conv1", "conv2")

    @staticmethod
    def rests_on(block: nn.Module) -> dict[str, nn.Module]:
        return {"conv2": block.conv2}

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        y = self.in_one(x) if residual is x and torch.is_grad_enabled() else None
        return super().add(x, residual) if y is None else y

    def in_one(self, x: torch.Tensor) -> torch.Tensor | None:
        """The branch and x by one operator, None if it does not compute them."""
        first, second = self.conv1, self.conv2
        known = is_plain_layer(first) and is_plain_layer(second) and not int8.is_marked(first.conv, second.conv)
        if known and first.norm is None and second.act is None and can_fuse_norm(second.norm):
            return res_block(first.conv, activation_name(first.act), second.conv, second.norm, x)
        return None

    def body(self, x: torch.Tensor, out_factor: torch.Tensor | None) -> torch.Tensor:
        return compute(self.first_layer(), x, out_factor)

    def first_layer(self) -> nn.Module:
        return self._modules["conv1"]

    def last_layer(self) -> nn.Module:
        return self._modules["conv2"]


class GLUMBConv(Branch):
    operators = (*ConvLayer.operators, "depthwise_glu")
    attributes = ("inverted_conv", "depth_conv", "point_conv", "glu_act")

    @staticmethod
    def rests_on(block: nn.Module) -> dict[str, nn.Module]:
        return {} if gates_in_one_pass(block) else {"point_conv": block.point_conv}

    def body(self, x: torch.Tensor, out_factor: torch.Tensor | None) -> torch.Tensor:
        modules = self._modules
        x, depth = compute(self.first_layer(), x), modules["depth_conv"]
        if gates_in_one_pass(self):
            return int8.depthwise_glu(x, depth._modules["conv"], out_factor)
        value, gate = depth(x).chunk(2, dim=1)
        return int8.quantized(value * self.glu_act(gate), out_factor)

    def first_layer(self) -> nn.Module:
        return self._modules["inverted_conv"]

    def last_layer(self) -> nn.Module:
        return self._modules["point_conv"]


def gates_in_one_pass(block: nn.Module) -> bool:
    """Whether `ops.depthwise_glu` computes a GLUMBConv's depthwise convolution and gate."""
    conv = bare_conv(block._modules["depth_conv"])
    return conv is not None and is_depthwise3x3(conv) and activation_name(block._modules["glu_act"]) == "silu"


class LiteMLA(Branch):
    operators = (*ConvLayer.operators, "multiscale_qkv", "relu_linear_attention")
    attributes = ("qkv", "aggreg", "proj", "dim", "eps")
    optional = ("kernel_func", "norm_q", "norm_k")

    @staticmethod
    def reason_not_fast(attention: nn.Module) -> str:
        if member(attention, "norm_qk") or member(attention, "norm_q") is not None:
            return "it has norms of queries and keys"
        kernel = member(attention, "kernel_func")
        return "" if type(kernel) in (nn.ReLU, type(None)) else f"its kernel function is {type(kernel).__name__}"

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if not self.is_known():
            y = self.eager(x)
            return y if residual is None else y + residual
        return super().add(x, residual)

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        return super().with_copy(x, copy, out_factor) if self.is_known() else (self.add(x, x), [])

    def is_known(self) -> bool:
        return not self.reason_not_fast(self) and unobserved(member(self, "kernel_func"))

    def body(self, x: torch.Tensor, out_factor: torch.Tensor | None) -> torch.Tensor:
        modules = self._modules
        qkv = compute(self.first_layer(), x)
        scales = [multiscale_qkv(scale, qkv) for scale in modules["aggreg"]]
        return int8.relu_linear_attention([qkv, *scales], self.dim, self.eps, out_factor)

    def first_layer(self) -> nn.Module:
        return self._modules["qkv"]

    def last_layer(self) -> nn.Module:
        return self._modules["proj"]


class PixelShuffleSampler(Part):
    """3×3 convolution and pixel (un)shuffle. The shuffle adds the bias, or one kernel computes everything."""

    operators = ("conv2d", "conv2d_unshuffle", "unshuffle_average_add", "duplicate_shuffle_add")
    attributes = ("conv", "factor")

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, shrinks = bare_conv(self.conv), "Unshuffle" in kind(self)
        if shrinks and not is_divisible(x, self.factor):
            return self.eager(x)
        if shrinks and self.factor == 2 and can_fuse_unshuffle(conv, x):
            return conv_unshuffle(conv, x)
        return self.shuffle(*self.without_bias(x))

    def shuffle(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        move = ops.unshuffle_average_add if "Unshuffle" in kind(self) else ops.duplicate_shuffle_add
        return move(None, x, bias, self.factor)

    def without_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution without its bias and before the shuffle, and the bias, as in `fusion.conv_without_bias`."""
        if isinstance(self.conv, ConvLayer) and unobserved(self.conv):
            return self.conv.without_bias(x)
        return self.conv(x), None


class InterpolateSampler(Part):
    """Nearest-neighbour up-sampling and 3×3 convolution."""

    operators = (*ConvLayer.operators, "upsample_conv2d")
    attributes = ("conv", "factor")

    @staticmethod
    def reason_not_fast(sampler: nn.Module) -> str:
        how = member(sampler, "mode") or "nearest"
        return "" if (sampler.factor, how) == (2, "nearest") else f"it enlarges {sampler.factor} times, {how}"

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.eager(x) if self.reason_not_fast(self) else self.conv(upsample(x))

    def without_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The result, or its planes as `ops.duplicate_shuffle_add` takes them, without the bias; and the bias."""
        conv = bare_conv(self.conv)
        if conv is None or self.reason_not_fast(self):
            return self(x), None
        return int8.upsample_conv_without_bias(conv, x)


class ResidualBlock(int8.Block):
    """main(x) + shortcut(x). The last kernel of main adds both, or the kernel of the shortcut."""

    operators = ("unshuffle_average_add", "duplicate_shuffle_add")
    attributes = ("main", "shortcut")
    optional = ("pre_norm", "post_act")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        if member(block, "pre_norm") is not None or member(block, "post_act") is not None:
            return "it has a norm before the branch or an activation after the sum"
        shortcut = block.shortcut
        if block.main is None or shortcut is None:
            return "it has one branch"
        return "" if kind(shortcut) in SHORTCUTS else f"its shortcut is {type(shortcut).__name__}"

    @staticmethod
    def rests_on(block: nn.Module) -> dict[str, nn.Module]:
        return {"main": block.main} if kind(block.shortcut) in IDENTITIES else {}

    @staticmethod
    def describe(block: nn.Module, survey: Survey) -> list[Layer]:
        return [layer_of(block, survey)]

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_copy(x, [], None)[0]

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        modules = self._modules
        main, shortcut = modules.get("main"), modules.get("shortcut")
        if main is None or modules.get("pre_norm") is not None or modules.get("post_act") is not None:
            return self.eager(x), []
        name, seen = kind(shortcut), not unobserved(main, shortcut)
        if name in IDENTITIES:
            if seen or not isinstance(main, Branch):
                return self.eager(x), []
            return main.with_copy(x, copy, out_factor) if copy or out_factor is not None else (main.add(x, x), [])
        if name not in SHORTCUTS or (seen and not unobserved(shortcut)):
            return self.eager(x), []
        averages = name in AVERAGING
        if averages and not is_divisible(x, shortcut.factor):
            return self.eager(x), []
        if seen or not isinstance(main, (PixelShuffleSampler, InterpolateSampler, ConvLayer)):
            y, bias, out_factor = main(x), None, None
        else:
            y, bias = main.without_bias(copy.pop() if copy else x)
        if out_factor is None:
            add = ops.unshuffle_average_add if averages else ops.duplicate_shuffle_add
            return add(x, y, bias, shortcut.factor), []
        add = ops.unshuffle_average_add_int8 if averages else ops.duplicate_shuffle_add_int8
        y, q = add(x, y, bias, out_factor, shortcut.factor)
        return y, [q]

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        main = self._modules.get("main")
        if isinstance(main, Branch):
            first = main.first_layer()
        elif isinstance(main, (PixelShuffleSampler, InterpolateSampler)):
            first = main._modules["conv"]
        else:
            return None
        if not isinstance(first, ConvLayer) or not int8.is_marked(first._modules["conv"]):
            return None
        known = isinstance(main, Branch) or (bare_conv(first) is not None and not main.reason_not_fast(main))
        return first.input_factor(x) if known and unobserved(main, first, self._modules.get("shortcut")) else None


BLOCKS = {
    "ConvLayer": ConvLayer,
    "ConvPixelShuffleUpSampleLayer": PixelShuffleSampler,
    "ConvPixelUnshuffleDownSampleLayer": PixelShuffleSampler,
    "GLUMBConv": GLUMBConv,
    "InterpolateConvUpSampleLayer": InterpolateSampler,
    "LiteMLA": LiteMLA,
    "OpSequential": OpSequential,
    "ResBlock": ResBlock,
    "ResidualBlock": ResidualBlock,
}
PLAIN_BLOCKS = dict.fromkeys(
    ("AdaptiveInputConvLayer", "AdaptiveOutputConvLayer", "IdentityLayer", *AVERAGING, *DUPLICATING)
) | {"EfficientViTBlock": describe_efficientvit_block}
CODERS = {"Encoder": Encoder, "Decoder": Decoder}

# this project
register("models.blocks", BLOCKS | {"RMSNorm2d": RMSNorm2d}, PLAIN_BLOCKS)
register("models.autoencoder", CODERS)
# the original
register("models.nn.ops", BLOCKS, PLAIN_BLOCKS)
register("models.nn.norm", {"RMSNorm2d": RMSNorm2d, "TritonRMSNorm2d": RMSNorm2d})
register("aecore.models.dc_ae", CODERS)
register("models.efficientvit.dc_ae", CODERS)
