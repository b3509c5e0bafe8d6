"""patch, unpatch, patched: swap the classes of a model's modules for fast subclasses, and back."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from dcae_fast.ops._library import EXTENSION_IS_BUILT, HAS_TRITON, INTERPRETED, cuda_extension

from . import dcae, diffusers, transformer
from .coder import Coder, configure, release
from .graphs import Graphs, NetworkGraphs
from .module import FastModule, fast_class, qualified_name, unsharded_class, without_mixin
from .network import Network

OPERATORS = (
    "bias_act",
    "concatenate",
    "conv2d",
    "conv2d_unshuffle",
    "depthwise_glu",
    "duplicate_shuffle_add",
    "layer_norm",
    "linear",
    "mlp",
    "multiscale_qkv",
    "packed_attention",
    "relu_linear_attention",
    "rms_norm",
    "rms_norm_conv2d",
    "unshuffle_average_add",
    "upsample_conv2d",
)

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
_DIFFUSERS = "diffusers.models.autoencoders.autoencoder_dc"


def _under(module: str, classes: dict[str, type[FastModule]]) -> dict[str, type[FastModule]]:
    return {f"{module}.{name}": mixin for name, mixin in classes.items()}


# Qualified name of a class → the mixin that makes it fast. The original code exists under two package roots.
REGISTRY: dict[str, type[FastModule]] = {
    **_under("dcae_fast.models.blocks", {**_BLOCKS, "RMSNorm2d": dcae.RMSNorm2d}),
    **_under("dcae_fast.models.autoencoder", _CODERS),
    "dcae_fast.models.dit.DiT": transformer.DiT,
    "dcae_fast.models.transformer.PatchEmbed": transformer.PatchEmbed,
    "dcae_fast.models.uvit.UViT": Network,
    **_under("dc_gen.aecore.models.dc_ae", _CODERS),
    **_under("efficientvit.models.efficientvit.dc_ae", _CODERS),
    **_under(
        _DIFFUSERS,
        {
            "DCDownBlock2d": diffusers.DCDownBlock2d,
            "DCUpBlock2d": diffusers.DCUpBlock2d,
            "Decoder": diffusers.Decoder,
            "Encoder": diffusers.Encoder,
            "ResBlock": diffusers.ResBlock,
        },
    ),
    "diffusers.models.attention_processor.SanaMultiscaleLinearAttention": diffusers.SanaMultiscaleLinearAttention,
    "diffusers.models.transformers.sana_transformer.GLUMBConv": diffusers.GLUMBConv,
}
for _root in ("dc_gen", "efficientvit"):
    REGISTRY |= _under(f"{_root}.models.nn.ops", _BLOCKS)
    REGISTRY |= _under(f"{_root}.models.nn.norm", {"RMSNorm2d": dcae.RMSNorm2d, "TritonRMSNorm2d": dcae.RMSNorm2d})
for _models in ("dcae_fast.models", "dc_gen.c2icore.diffusioncore.models", "efficientvit.diffusioncore.models"):
    REGISTRY[f"{_models}.uvit.Block"] = transformer.Block
    REGISTRY |= _under(f"{_models}.dit", {"DiTBlock": transformer.DiTBlock, "FinalLayer": transformer.FinalLayer})


@dataclass
class Report:
    """What `patch` did. replaced: class name → modules; skipped: (path, class name, reason); note: one line."""

    replaced: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        rows = [("module", "patched", "left as it is, because")]
        rows += [(name, str(count), "") for name, count in sorted(self.replaced.items())]
        reasons = Counter((name, reason) for _, name, reason in self.skipped)
        rows += [(name, "", f"{reason} ({count})") for (name, reason), count in sorted(reasons.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = [f"{name:<{widths[0]}}  {count:>{widths[1]}}  {reason}".rstrip() for name, count, reason in rows]
        return "\n".join([*table, self.note] if self.note else table)


def patch(
    model: nn.Module, disable: Iterable[str] = (), cuda_graphs: bool = False, max_memory: int | None = None
) -> Report:
    """Make a DC-AE fast, and the diffusion transformers on its latents: this project's, diffusers'
    `AutoencoderDC` or the original DC-Gen / efficientvit one.

    Every module whose exact class is known gets a subclass with a fast forward; parameters, buffers, names and hooks
    stay. A module that needs an operator named in `disable`, or in the environment variable DCAE_FAST_DISABLE ("all" or
    names separated by commas), keeps or gets back its own. So does one whose forward was replaced on the instance
    before; what replaces it afterwards, torch.compile(module.forward) for one, calls the fast forward until `unpatch`.
    Patching twice is the same as once; other options replace the former ones.

    cuda_graphs: inference calls of a patched encoder, decoder or transformer are captured the second time that they
    have the same shape and type, and replayed from then on; so are the steps of `DCAEDiffusion.generate`. Eight graphs
    each are kept, with the memory that they compute in.
    max_memory: bytes that an encoder or decoder may allocate in an inference call, its result included; where it would
    take more it computes a few images at a time, and the layers that do not fit in bands of rows, with the same result
    to rounding. None: what is free on the GPU, no bound on a CPU.

    Returns a report that prints as a table. Raises ValueError on an unknown operator name and unless max_memory is
    positive, and RuntimeError after fully_shard (FSDP2), which makes classes of its own: patch before it.
    """
    disabled = _disabled(disable)
    if max_memory is not None and max_memory <= 0:
        raise ValueError(f"max_memory={max_memory}; expected a positive number of bytes")
    report = Report()
    for path, module, cls, reason in _known_modules(model, disabled):
        name = without_mixin(cls).__name__
        _set_class(module, cls)
        if reason:
            release(module)
            report.skipped.append((path, name, reason))
            continue
        if issubclass(cls, Coder):
            configure(module, Graphs() if cuda_graphs else None, max_memory)
        elif issubclass(cls, Network):
            configure(module, NetworkGraphs() if cuda_graphs else None, None)
        report.replaced[name] += 1
    report.note = _note(model, report)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every patched module its own class back. Raises RuntimeError after fully_shard (FSDP2)."""
    for _, module, cls, _ in _known_modules(model, {"all"}):
        release(module)
        _set_class(module, cls)


@contextlib.contextmanager
def patched(
    model: nn.Module, disable: Iterable[str] = (), cuda_graphs: bool = False, max_memory: int | None = None
) -> Iterator[Report]:
    """`patch` for a scope: every module whose class it changes has the former one back on the way out, and its options.

    Graphs that were captured before serve again afterwards.
    """
    before = [(module, type(module), vars(module).pop("fast_options", None)) for module in model.modules()]
    changed = []
    try:
        report = patch(model, disable, cuda_graphs, max_memory)
        changed += [(module, cls) for module, cls, _ in before if type(module) is not cls]
        yield report
    finally:
        for module, cls in changed:
            _set_class(module, cls)
        for module, _, options in before:
            release(module)
            if options is not None:
                module.fast_options = options


def _known_modules(model: nn.Module, disabled: set[str]) -> list[tuple[str, nn.Module, type[nn.Module], str]]:
    """(path, module, the class that it is to have, why that is not a fast one) of those in REGISTRY."""
    known = []
    for path, module in model.named_modules():
        own = without_mixin(unsharded_class(module))
        mixin = REGISTRY.get(qualified_name(own))
        if mixin is not None:
            reason = _reason_to_skip(module, mixin, disabled)
            cls = own if reason else fast_class(mixin, own)
            _check_not_sharded(module, cls)
            known.append((path, module, cls, reason))
    return known


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    _check_not_sharded(module, cls)
    if unsharded_class(module) is not cls:
        module.__class__ = cls


def _check_not_sharded(module: nn.Module, cls: type[nn.Module]) -> None:
    """A class that fully_shard has made of another one than cls has the methods of that one."""
    before = unsharded_class(module)
    if before is not type(module) and before is not cls:
        name = without_mixin(cls).__name__
        raise RuntimeError(f"a {name} has a class that fully_shard made: patch and unpatch a model before fully_shard")


def _disabled(disable: Iterable[str]) -> set[str]:
    asked = {disable} if isinstance(disable, str) else set(disable)
    asked |= {name.strip() for name in os.environ.get("DCAE_FAST_DISABLE", "").split(",") if name.strip()}
    unknown = asked - {"all", *OPERATORS}
    if unknown:
        raise ValueError(f"unknown operators to disable: {sorted(unknown)}; expected 'all' or some of {OPERATORS}")
    return asked


def _reason_to_skip(module: nn.Module, mixin: type[FastModule], disabled: set[str]) -> str:
    if "all" in disabled:
        return "everything is disabled"
    missing = sorted(disabled.intersection(mixin.operators))
    if missing:
        return f"{', '.join(missing)} disabled"
    if "forward" in module.__dict__ and not isinstance(module, FastModule):  # which may not know the fast one
        return "its forward was replaced on the instance"
    return ""


def _note(model: nn.Module, report: Report) -> str:
    if not report.replaced and not report.skipped:
        return f"{type(model).__name__} has no module of a DC-AE that is known here: nothing was patched."
    if not torch.cuda.is_available() and not INTERPRETED:
        return "No CUDA device: on a CPU the modules' own forwards run."
    if not HAS_TRITON:
        return "Triton is not installed: the modules' own forwards run."
    if torch.cuda.is_available() and cuda_extension() is None:
        state = "does not load" if EXTENSION_IS_BUILT else "is not built"
        return f"dcae_fast._C {state}: convolutions, linear layers and attention are torch's, all else runs in Triton."
    libraries = {"Convolution": "cuDNN: convolutions are torch's", "Product": "cuBLASLt: linear layers are torch's"}
    missing = [words for name, words in libraries.items() if not hasattr(cuda_extension(), name)]
    if torch.cuda.is_available() and missing:
        return f"dcae_fast._C is built without {'; without '.join(missing)}."
    return ""
