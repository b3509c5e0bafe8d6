"""The classes that `patch` knows, and the mixins that make them fast."""

from torch import nn

from . import dcae, diffusers, transformer
from .module import FastModule
from .names import below_roots
from .network import Network


def _under(module: str, classes: dict[str, type[FastModule]]) -> dict[str, type[FastModule]]:
    return {f"{module}.{name}": mixin for name, mixin in classes.items()}


_BLOCKS = {
    "ConvLayer": dcae.ConvLayer,
    "ConvPixelShuffleUpSampleLayer": dcae.PixelShuffleSampler,
    "ConvPixelUnshuffleDownSampleLayer": dcae.PixelShuffleSampler,
    "GLUMBConv": dcae.GLUMBConv,
    "InterpolateConvUpSampleLayer": dcae.InterpolateSampler,
    "LiteMLA": dcae.LiteMLA,
    "OpSequential": dcae.OpSequential,
    "ResBlock": dcae.ResBlock,
    "ResidualBlock": dcae.ResidualBlock,
}
_CODERS = {"Encoder": dcae.Encoder, "Decoder": dcae.Decoder}
_UVIT = {"Block": transformer.Block}
_DIT = {"DiTBlock": transformer.DiTBlock, "FinalLayer": transformer.FinalLayer}

# Qualified name of a class below a package root → the mixin that makes it fast.
KNOWN: dict[str, type[FastModule]] = {
    # this project
    **_under("models.blocks", _BLOCKS | {"RMSNorm2d": dcae.RMSNorm2d}),
    **_under("models.autoencoder", _CODERS),
    **_under("models.dit", _DIT | {"DiT": transformer.DiT}),
    "models.transformer.PatchEmbed": transformer.PatchEmbed,
    **_under("models.uvit", _UVIT | {"UViT": Network}),
    # the original: DC-Gen, efficientvit and their copies
    **_under("models.nn.ops", _BLOCKS),
    **_under("models.nn.norm", {"RMSNorm2d": dcae.RMSNorm2d, "TritonRMSNorm2d": dcae.RMSNorm2d}),
    **_under("aecore.models.dc_ae", _CODERS),
    **_under("models.efficientvit.dc_ae", _CODERS),
    **_under("c2icore.diffusioncore.models.uvit", _UVIT | {"UViT": transformer.OriginalNetwork}),
    **_under("diffusioncore.models.uvit", _UVIT | {"UViT": transformer.OriginalNetwork}),
    **_under("c2icore.diffusioncore.models.dit", _DIT | {"DiT": transformer.OriginalNetwork}),
    **_under("diffusioncore.models.dit", _DIT | {"DiT": transformer.OriginalNetwork}),
    # diffusers
    **_under(
        "models.autoencoders.autoencoder_dc",
        {
            "DCDownBlock2d": diffusers.DCDownBlock2d,
            "DCUpBlock2d": diffusers.DCUpBlock2d,
            "Decoder": diffusers.Decoder,
            "Encoder": diffusers.Encoder,
            "ResBlock": diffusers.ResBlock,
        },
    ),
    "models.attention_processor.SanaMultiscaleLinearAttention": diffusers.SanaMultiscaleLinearAttention,
    "models.transformers.sana_transformer.GLUMBConv": diffusers.GLUMBConv,
}
_MODULES = {path.rpartition(".")[0] for path in KNOWN}


def mixin_of(cls: type[nn.Module]) -> type[FastModule] | None:
    """What makes modules of this very class fast; None if it is unknown."""
    return next((KNOWN[path] for path in below_roots(cls) if path in KNOWN), None)


def is_of_known_module(cls: type[nn.Module]) -> bool:
    """Whether a class is defined beside known ones."""
    return any(path.rpartition(".")[0] in _MODULES for path in below_roots(cls))


def unlike(mixin: type[FastModule], module: nn.Module) -> str:
    """What a module lacks, or has too much, to be of the class that a mixin is written for; empty if it fits."""
    missing = [name for name in mixin.attributes if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    known = {*mixin.attributes, *mixin.optional}
    others = [name for name, child in module.named_children() if name not in known] if known else []
    return f"it also has {', '.join(others)}" if others else ""


def resemblance(cls: type[nn.Module], module: nn.Module) -> str:
    """Why `patch` skips a module of an unknown class that looks like one of a DC-AE; empty if it does not look so.

    Of classes that are defined beside known ones the code is known, and has no fast forward.
    """
    if is_of_known_module(cls):
        return ""
    named = [mixin for path, mixin in KNOWN.items() if path.rpartition(".")[2] == cls.__name__]
    if any(len(mixin.attributes) > 1 and not unlike(mixin, module) for mixin in named):
        how = "" if below_roots(cls) else ": see dcae_fast.register_root"
        return f"{cls.__module__} is no known module of a DC-AE{how}"
    known = next((base for base in cls.__mro__ if mixin_of(base) is not None), None)
    return "" if known is None else f"it derives from {known.__name__}, and may do something else"
