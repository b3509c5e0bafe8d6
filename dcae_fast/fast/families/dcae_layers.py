"""The layers of dcae.py for bounded memory."""

from torch import nn

from ..layers import Layer, Resampling, Survey, UnknownModule, known
from ..module import kind

IDENTITIES = ("Identity", "IdentityLayer")
AVERAGING = ("PixelUnshuffleChannelAveragingDownSampleLayer",)
DUPLICATING = ("ChannelDuplicatingPixelShuffleUpSampleLayer", "ChannelDuplicatingPixelUnshuffleUpSampleLayer")

SHORTCUTS = {*IDENTITIES, *AVERAGING, *DUPLICATING}


def layer_of(block: nn.Module, survey: Survey) -> Layer:
    """A ResidualBlock, main(x) + shortcut(x), as a layer."""
    main, shortcut = block.main, block.shortcut
    if getattr(block, "pre_norm", None) is not None or getattr(block, "post_act", None) is not None:
        raise UnknownModule("pre_norm or post_act")
    match kind(main), kind(shortcut):
        case "ResBlock", "Identity" | "IdentityLayer":
            (first, act, _), (second, _, norm) = map(parts, (main.conv1, main.conv2))
            return survey.res_block(block, first, second, act, norm, main)
        case "GLUMBConv", "Identity" | "IdentityLayer":
            convs = [parts(conv)[0] for conv in (main.inverted_conv, main.depth_conv, main.point_conv)]
            return survey.gated(block, *convs, main.glu_act, main.point_conv.norm, main)
        case "LiteMLA", "Identity" | "IdentityLayer":
            width, scales = parts(main.qkv)[0].out_channels // 3, len(main.aggreg)
            lean = survey.is_lean(block, main) and not getattr(main, "norm_qk", False)
            return survey.attention(block, parts(main.proj)[0].out_channels, width, scales, lean)
        case _, name if name in AVERAGING or name in DUPLICATING:
            layer = survey.sampler(resampling(main), block)
            if shortcut.factor == (layer.down if name in AVERAGING else layer.up):
                return layer
    raise UnknownModule(f"{kind(main)} and {kind(shortcut)}")


def parts(layer: nn.Module) -> tuple[nn.Conv2d, nn.Module | None, nn.Module | None]:
    """Convolution, activation and norm of a ConvLayer."""
    if kind(layer) != "ConvLayer" or getattr(layer, "dropout", None) is not None:
        raise UnknownModule(type(layer).__name__)
    known(layer.act, layer.norm)
    return layer.conv, layer.act, layer.norm


def resampling(module: nn.Module) -> Resampling:
    """How a down- or up-sampling layer changes the resolution, or a convolution by its stride."""
    match kind(module):
        case "ConvLayer":
            conv = parts(module)[0]
            return conv, "stride", conv.stride[0]
        case "ConvPixelUnshuffleDownSampleLayer":
            return parts(module.conv)[0], "unshuffle", module.factor
        case "ConvPixelShuffleUpSampleLayer":
            return parts(module.conv)[0], "shuffle", module.factor
        case "InterpolateConvUpSampleLayer" if getattr(module, "mode", "nearest") == "nearest":
            return parts(module.conv)[0], "nearest", module.factor
    raise UnknownModule(type(module).__name__)


def describe_efficientvit_block(block: nn.Module, survey: Survey) -> list[Layer]:
    return survey.blocks([block.context_module, block.local_module])
