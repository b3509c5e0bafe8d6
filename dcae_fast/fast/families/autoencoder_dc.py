"""diffusers' AutoencoderDC. Its blocks add their residuals themselves."""

from collections.abc import Iterable

import torch
from torch import nn

from dcae_fast import ops
from dcae_fast.ops._private import unobserved

from .. import int8, operands
from ..call import Coder
from ..fusion import (
    activation_name,
    autocasts,
    can_fuse_conv,
    can_fuse_norm,
    can_fuse_unshuffle,
    compute_dtype,
    conv_norm_act,
    conv_unshuffle,
    conv_without_bias,
    is_depthwise3x3,
    is_divisible,
    multiscale_qkv,
    norm_act_conv,
    norm_dtype,
    res_block,
    rms_norm,
    unknown_activation,
    unknown_norm,
)
from ..layers import Layer, Resampling, Survey, UnknownModule
from ..module import kind, plain
from ..registry import register


def _stem(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """conv(x), for the encoder's first convolution or a down-sampling block."""
    return conv_norm_act(conv, None, "none", x) if can_fuse_conv(conv, x) else conv(x)


def _in_sequence(stages: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The result of stages, one after the other. Blocks in 8 bit write copies for the blocks that follow."""
    blocks, copy = [block for stage in stages for block in _blocks_of(stage)], []
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        x, copy = int8.compute_with_copy(block, x, copy, following)
    return x


def _blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that a stage or an EfficientViTBlock consists of, or the module itself."""
    modules = module._modules
    if type(module) is nn.Sequential and unobserved(module):
        return [block for child in modules.values() for block in _blocks_of(child)]
    if kind(module) == "EfficientViTBlock" and unobserved(module):
        return [modules["attn"], modules["conv_out"]]
    return [module]


class Encoder(Coder):
    """The shortcut of the head is one pass."""

    operators = ("conv2d", "unshuffle_average_add")
    attributes = ("conv_in", "down_blocks", "conv_out", "out_shortcut")
    ends = ("conv_in", "conv_out")

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(_in_sequence(self.down_blocks, _stem(self.conv_in, x)))

    def layers(self, survey: Survey) -> list[Layer]:
        def stem(x: torch.Tensor) -> torch.Tensor:
            return _stem(self.conv_in, self.as_layers_see(x))

        return [survey.sampler(resampling(self.conv_in), self.conv_in, stem), *survey.blocks(self.down_blocks)]

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        if self.out_shortcut:
            return ops.unshuffle_average_add(x, *conv_without_bias(self.conv_out, x), factor=1)
        return self.conv_out(x)


class Decoder(Coder):
    """The shortcut of the stem is one pass, and so are norm and activation of the head."""

    operators = ("conv2d", "duplicate_shuffle_add", "rms_norm", "rms_norm_conv2d")
    attributes = ("conv_in", "up_blocks", "norm_out", "conv_act", "conv_out", "in_shortcut")
    ends = ("conv_in", "conv_out")

    def fast_forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.head(_in_sequence(reversed(self.up_blocks), self.start(z)))

    def enlargement(self) -> int:
        return 2 ** (len(self.up_blocks) - 1)

    def start(self, z: torch.Tensor) -> torch.Tensor:
        x = self.as_layers_see(z)
        if self.in_shortcut:
            return ops.duplicate_shuffle_add(x, *conv_without_bias(self.conv_in, x), factor=1)
        return self.as_layers_see(self.conv_in(x))

    def layers(self, survey: Survey) -> list[Layer]:
        last = resampling(self.conv_out)
        head = survey.head(self.head, self, self.norm_out, self.conv_act, last, self.conv_out)
        return [*survey.blocks(reversed(self.up_blocks)), head]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        norm, act = self.norm_out, activation_name(self.conv_act)
        if act is None or kind(norm) != "RMSNorm" or not can_fuse_norm(norm) or not ops.has_kernels(x):
            return self.conv_out(self.conv_act(norm(x.movedim(1, -1)).movedim(-1, 1)))
        return _norm_act_head(norm, act, self.conv_out, x)


def _norm_act_head(norm: nn.Module, act: str, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """head(act(norm(x))), for the decoder's last convolution or an up-sampling block."""
    shuffled = isinstance(head, DCUpBlock2d) and plain(head) and not head.interpolate and not head.shortcut
    if norm_dtype(norm, x) == x.dtype or autocasts(x):
        y = norm_act_conv(norm, act, head.conv if shuffled else head, x)
        if y is not None:
            return ops.duplicate_shuffle_add(None, y, None, head.factor) if shuffled else y
    return head(rms_norm(norm, x, act))


def missing_norm(norm: nn.Module | None) -> str:
    """Why a block that needs a norm cannot be fast; empty if it can."""
    return "it has no norm" if norm is None else unknown_norm(norm)


class ResBlock(int8.Block):
    """If a gradient is wanted, one operator computes the block."""

    operators = ("batch_norm_act", "bias_act", "conv2d", "res_block", "rms_norm")
    attributes = ("conv1", "nonlinearity", "conv2", "norm")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        return unknown_activation(block.nonlinearity) or missing_norm(block.norm)

    @staticmethod
    def describe(block: nn.Module, survey: Survey) -> list[Layer]:
        return [survey.res_block(block, block.conv1, block.conv2, block.nonlinearity, block.norm)]

    def int8_layers(self) -> tuple[nn.Module, ...]:
        return self.conv1, self.conv2

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._in_one(x) if torch.is_grad_enabled() else None
        return self.with_copy(x, [], None)[0] if y is None else y

    def _in_one(self, x: torch.Tensor) -> torch.Tensor | None:
        """The block by one operator, None if it does not compute the block."""
        act = self._known_activation()
        known = act is not None and not int8.is_marked(self.conv1, self.conv2)
        return res_block(self.conv1, act, self.conv2, self.norm, x) if known else None

    def _known_activation(self) -> str | None:
        """The activation's name; None if the block takes its own forward."""
        act = activation_name(self.nonlinearity)
        return None if self.reason_not_fast(self) or not can_fuse_norm(self.norm) else act

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        factor = int8.factor_of(self.conv1, x)  # first, since it is None at once for an exact layer
        return None if factor is None or self._known_activation() is None else factor

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        act = self._known_activation()
        if act is None:
            return self.eager(x), []
        source = copy.pop() if copy else x
        y = int8.conv_norm_act(self.conv1, None, act, source, out_factor=int8.factor_of(self.conv2, x))
        return int8.with_copy(self.conv2, self.norm, "none", y, x, out_factor)


class GLUMBConv(int8.Block):
    """In SANA's transformer (sana.py) it has neither norm nor residual."""

    operators = ("batch_norm_act", "bias_act", "conv2d", "rms_norm", "depthwise_glu")
    attributes = ("conv_inverted", "nonlinearity", "conv_depth", "conv_point", "norm", "residual_connection")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        if type(block.nonlinearity) is not nn.SiLU:
            return f"its activation is {type(block.nonlinearity).__name__}"
        return missing_norm(block.norm) if block.norm_type is not None else unknown_norm(block.norm)

    @staticmethod
    def describe(block: nn.Module, survey: Survey) -> list[Layer]:
        convs = block.conv_inverted, block.conv_depth, block.conv_point
        return [survey.gated(block, *convs, block.nonlinearity, block.norm)]

    def int8_layers(self) -> tuple[nn.Module, ...]:
        return self.conv_inverted, self.conv_point

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_copy(x, [], None)[0]

    def _known_activation(self) -> str | None:
        """The activation's name; None if the block takes its own forward."""
        known = not self.reason_not_fast(self) and is_depthwise3x3(self.conv_depth) and can_fuse_norm(self.norm)
        return activation_name(self.nonlinearity) if known else None

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        factor = int8.factor_of(self.conv_inverted, x)
        return None if factor is None or self._known_activation() is None else factor

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        act = self._known_activation()
        if act is None:
            return self.eager(x), []
        y = int8.conv_norm_act(self.conv_inverted, None, act, copy.pop() if copy else x)
        y = int8.depthwise_glu(y, self.conv_depth, int8.factor_of(self.conv_point, x))
        if not self.residual_connection:
            return int8.conv_norm_act(self.conv_point, self.norm, "none", y), []
        return int8.with_copy(self.conv_point, self.norm, "none", y, x, out_factor)


class SanaMultiscaleLinearAttention(int8.Block):
    """diffusers also computes it channels-last, from the first linear layers to the result."""

    operators = ("multiscale_qkv", "relu_linear_attention", "rms_norm")
    attributes = ("to_q", "to_k", "to_v", "to_qkv_multiscale", "nonlinearity", "to_out", "norm_out", "processor")

    @staticmethod
    def reason_not_fast(attention: nn.Module) -> str:
        if type(attention.processor).__name__ != "SanaMultiscaleAttnProcessor2_0":
            return f"its processor is {type(attention.processor).__name__}"
        if type(attention.nonlinearity) is not nn.ReLU:
            return f"its kernel function is {type(attention.nonlinearity).__name__}"
        norm = attention.norm_out
        return unknown_norm(norm) if kind(norm) == "RMSNorm" else f"its norm is {type(norm).__name__}"

    @staticmethod
    def describe(attention: nn.Module, survey: Survey) -> list[Layer]:
        width, scales = attention.to_q.out_features, len(attention.to_qkv_multiscale)
        lean = survey.is_lean(attention)
        return [survey.attention(attention, attention.to_out.out_features, width, scales, lean)]

    def int8_layers(self) -> tuple[nn.Module, ...]:
        """The first counts for queries, keys and values, which are one product."""
        return self.to_q, self.to_out

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_copy(x, [], None)[0]

    def _is_known(self) -> bool:
        known = type(self.to_out) is nn.Linear and plain(self.to_out, self.nonlinearity)
        return known and not self.reason_not_fast(self) and can_fuse_norm(self.norm_out)

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        factor = int8.factor_of(self.to_q, x)
        return None if factor is None or not (self._is_known() and self._joins(x)) else factor

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        if not self._is_known():
            return self.eager(x), []
        qkv = int8.linear((self.to_q, self.to_k, self.to_v), copy.pop()) if copy else self._qkv(x)
        scales = [multiscale_qkv(scale, qkv) for scale in self.to_qkv_multiscale]
        factor = int8.factor_of(self.to_out, x)
        y = int8.relu_linear_attention([qkv, *scales], self.attention_head_dim, self.eps, factor)
        y = self.to_out(y.movedim(1, -1)).movedim(-1, 1) if factor is None else int8.linear((self.to_out,), y)
        if not self.residual_connection:
            return rms_norm(self.norm_out, y), []
        return int8.norm_with_copy(self.norm_out, y, "none", x, out_factor)

    def _joins(self, x: torch.Tensor) -> bool:
        """Whether one product computes queries, keys and values of x."""
        parts = (self.to_q, self.to_k, self.to_v)
        if not all(type(part) is nn.Linear and part.bias is None for part in parts) or not plain(*parts):
            return False
        dtypes = (compute_dtype(x), torch.float32) if autocasts(x) else (x.dtype,)
        return all(part.weight.dtype in dtypes for part in parts)

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values [B, 3 C, H, W] from one product for the three projections."""
        parts = (self.to_q, self.to_k, self.to_v)
        if self._joins(x):
            qkv = int8.linear(parts, x)
            if qkv is not None:
                return qkv
            pixels = x.contiguous(memory_format=torch.channels_last).movedim(1, -1)
            weight, _ = operands.of_joined_layers(parts, compute_dtype(x))
            return nn.functional.linear(pixels, weight).movedim(-1, 1)
        return torch.cat([part(x.movedim(1, -1)) for part in parts], dim=-1).movedim(-1, 1)


class DCDownBlock2d(int8.Block):
    operators = ("conv2d", "conv2d_unshuffle", "unshuffle_average_add")
    attributes = ("conv", "factor", "downsample", "shortcut")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        return "" if block.downsample or block.shortcut else "it is a convolution and nothing else"

    @staticmethod
    def describe(block: nn.Module, survey: Survey) -> list[Layer]:
        return [survey.sampler(resampling(block), block)]

    def int8_layers(self) -> tuple[nn.Module, ...]:
        return (self.conv,)

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reason_not_fast(self) or not is_divisible(x, self.factor):
            return self.eager(x)
        if not self.shortcut and self.factor == 2 and can_fuse_unshuffle(self.conv, x):
            return conv_unshuffle(self.conv, x)
        return self.with_copy(x, [], None)[0]

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.reason_not_fast(self) else int8.factor_of(self.conv, x)

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        if self.reason_not_fast(self) or not is_divisible(x, self.factor):
            return self.eager(x), []
        main, bias = int8.conv_without_bias(self.conv, copy.pop() if copy else x)
        shortcut = x if self.shortcut else None
        if out_factor is None:
            return ops.unshuffle_average_add(shortcut, main, bias, self.factor), []
        y, q = ops.unshuffle_average_add_int8(shortcut, main, bias, out_factor, self.factor)
        return y, [q]


class DCUpBlock2d(int8.Block):
    operators = ("conv2d", "duplicate_shuffle_add", "upsample_conv2d")
    attributes = ("conv", "factor", "interpolate", "interpolation_mode", "shortcut")

    @staticmethod
    def reason_not_fast(block: nn.Module) -> str:
        if not block.interpolate or (block.shortcut and block.interpolation_mode == "nearest"):
            return ""
        return (
            f"it enlarges by {block.interpolation_mode} interpolation, with{'' if block.shortcut else 'out'} a shortcut"
        )

    @staticmethod
    def describe(block: nn.Module, survey: Survey) -> list[Layer]:
        return [survey.sampler(resampling(block), block)]

    def int8_layers(self) -> tuple[nn.Module, ...]:
        return (self.conv,)

    def fast_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.with_copy(x, [], None)[0]

    def input_factor(self, x: torch.Tensor) -> torch.Tensor | None:
        return None if self.reason_not_fast(self) else int8.factor_of(self.conv, x)

    def with_copy(
        self, x: torch.Tensor, copy: int8.Copy, out_factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, int8.Copy]:
        if self.reason_not_fast(self):
            return self.eager(x), []
        convolve = int8.upsample_conv_without_bias if self.interpolate else int8.conv_without_bias
        main, bias = convolve(self.conv, copy.pop() if copy else x)
        shortcut = x if self.shortcut else None
        if out_factor is None:
            return ops.duplicate_shuffle_add(shortcut, main, bias, self.factor), []
        y, q = ops.duplicate_shuffle_add_int8(shortcut, main, bias, out_factor, self.factor)
        return y, [q]


def resampling(module: nn.Module) -> Resampling:
    """How a down- or up-sampling block changes the resolution, or a convolution by its stride."""
    match kind(module):
        case "Conv2d":
            return module, "stride", module.stride[0]
        case "DCDownBlock2d":
            return module.conv, "unshuffle" if module.downsample else "stride", module.factor
        case "DCUpBlock2d" if not module.interpolate:
            return module.conv, "shuffle", module.factor
        case "DCUpBlock2d" if module.interpolation_mode == "nearest":
            return module.conv, "nearest", module.factor
    raise UnknownModule(type(module).__name__)


def describe_efficientvit_block(block: nn.Module, survey: Survey) -> list[Layer]:
    return survey.blocks([block.attn, block.conv_out])


register(
    "models.autoencoders.autoencoder_dc",
    {
        "DCDownBlock2d": DCDownBlock2d,
        "DCUpBlock2d": DCUpBlock2d,
        "Decoder": Decoder,
        "Encoder": Encoder,
        "ResBlock": ResBlock,
    },
    {"EfficientViTBlock": describe_efficientvit_block},
)
register(
    "models.attention_processor",
    {"SanaMultiscaleLinearAttention": SanaMultiscaleLinearAttention},
    {"SanaMultiscaleAttentionProjection": None},
)
register("models.normalization", {}, {"RMSNorm": None})
register("models.transformers.sana_transformer", {"GLUMBConv": GLUMBConv})
