"""patch, unpatch, patched: swap the classes of a model's modules for fast subclasses, and back."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from .coder import Coder, configure, release
from .graphs import Graphs, NetworkGraphs
from .layout import Part
from .module import FastModule, change_class, class_in_use, fast_class, is_fast, original_class
from .names import register_root
from .network import Network
from .registry import is_of_known_module, mixin_of, resemblance, unlike
from .report import Report, missing

__all__ = ["OPERATORS", "Report", "patch", "patched", "register_root", "unpatch"]

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


def patch(model: Any, disable: Iterable[str] = (), cuda_graphs: bool = False, max_memory: int | None = None) -> Report:
    """Make a DC-AE fast, and the diffusion transformers on its latents: this project's, diffusers'
    `AutoencoderDC` or the original DC-Gen / efficientvit one, also in a copy inside another package (`register_root`).

    model: an nn.Module, or a pipeline: any object with a dictionary `components`, whose modules are patched.
    Every module whose exact class is known gets a subclass with a fast forward; parameters, buffers, names and hooks
    stay. These modules are left as they are, and the report names them with the reason:
    - a module that needs an operator named in `disable`, or in the environment variable DCAE_FAST_DISABLE ("all" or
      names separated by commas); if it was patched before, it gets its own forward back;
    - a module that can never take its fast forward, because of an option, an activation, a norm or a type of weights;
    - a block of an encoder or decoder inside a model of another kind; give `patch` the block itself to have it fast;
    - a module that resembles a known class but is of another one;
    - a module whose forward was replaced on the instance before. What replaces it afterwards, for example
      torch.compile(module.forward), calls the fast forward until `unpatch`.
    Patching twice is the same as once; other options replace the former ones.

    cuda_graphs: inference calls of a patched encoder, decoder or transformer are captured the second time that they
    have the same shape and type, and replayed from then on; so are the steps of `DCAEDiffusion.generate`. Eight graphs
    each are kept, with the memory that they compute in.
    max_memory: bytes that an encoder or decoder may allocate in an inference call, its result included; where it would
    take more it computes a few images at a time, and the layers that do not fit in bands of rows, with the same result
    to rounding. None: what is free on the GPU, no bound on a CPU.

    Returns a report that prints as a table. Raises TypeError for a model or an option of another type, and ValueError
    on an unknown operator name and unless max_memory is positive.
    """
    components, disabled = _components(model), _disabled(disable)
    if not isinstance(cuda_graphs, bool):
        raise TypeError(f"cuda_graphs={cuda_graphs!r}; expected True or False")
    if max_memory is not None and (isinstance(max_memory, bool) or not isinstance(max_memory, int)):
        raise TypeError(f"max_memory={max_memory!r}; expected a number of bytes, an integer, or None")
    if max_memory is not None and max_memory <= 0:
        raise ValueError(f"max_memory={max_memory}; expected a positive number of bytes")
    options = disabled, cuda_graphs, max_memory
    if components is None:
        return _patch(model, *options)
    if not components:
        return Report(note=f"{type(model).__name__} has no component that is a module: nothing was patched.")
    return Report.of_components({name: _patch(component, *options) for name, component in components.items()})


def _patch(model: nn.Module, disabled: set[str], cuda_graphs: bool, max_memory: int | None) -> Report:
    report, reasons = Report(), {}
    sharded = any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__)
    for path, module, within_coder in _parts(model):
        cls = original_class(module)
        mixin = mixin_of(cls)
        if mixin is None:
            reason = resemblance(cls, module)
        else:
            reason = _reason_not_fast(module, mixin, disabled, within_coder, sharded, reasons)
            change_class(module, cls if reason else fast_class(mixin, cls))
        if reason:
            release(module)
            reasons[module] = reason
            report.skipped.append((path, cls.__name__, reason))
        elif mixin is not None:
            report.replaced[cls.__name__] += 1
            if issubclass(mixin, Coder):
                configure(module, Graphs() if cuda_graphs else None, max_memory)
            elif issubclass(mixin, Network):
                configure(module, NetworkGraphs() if cuda_graphs else None, None)
    known = report.replaced or report.skipped
    unknown = f"{type(model).__name__} has no module of a DC-AE that is known here: nothing was patched."
    report.note = missing() if known else unknown
    return report


def unpatch(model: Any) -> None:
    """Give every patched module of a model or pipeline its own class back."""
    for module in _modules(model):
        if is_fast(module):
            release(module)
            change_class(module, original_class(module))


@contextlib.contextmanager
def patched(
    model: Any, disable: Iterable[str] = (), cuda_graphs: bool = False, max_memory: int | None = None
) -> Iterator[Report]:
    """`patch` for a scope: every module whose class it changes has the former one back on the way out, and its options.

    Graphs that were captured before serve again afterwards.
    """
    before = [(module, class_in_use(module), vars(module).pop("fast_options", None)) for module in _modules(model)]
    changed = []
    try:
        report = patch(model, disable, cuda_graphs, max_memory)
        changed += [(module, cls) for module, cls, _ in before if class_in_use(module) is not cls]
        yield report
    finally:
        for module, cls in changed:
            change_class(module, cls)
        for module, _, options in before:
            release(module)
            if options is not None:
                module.fast_options = options


def _components(model: Any) -> dict[str, nn.Module] | None:
    """The modules among the components of a pipeline; None of a module. Raises TypeError for anything else."""
    if isinstance(model, nn.Module):
        return None
    components = getattr(model, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(
            f"model is {_described(model)}; expected an nn.Module, or a pipeline with modules as components"
        )
    return {name: module for name, module in components.items() if isinstance(module, nn.Module)}


def _modules(model: Any) -> list[nn.Module]:
    components = _components(model)
    roots = [model] if components is None else components.values()
    return list(dict.fromkeys(module for root in roots for module in root.modules()))


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _parts(
    module: nn.Module, path: str = "", within_coder: bool = False, is_asked_for: bool = True, seen: set | None = None
) -> Iterator[tuple[str, nn.Module, bool]]:
    """(path, module, whether it lies in an encoder or decoder) of a module and all in it, each after those in it.

    A block that is given itself, or in PyTorch's own containers and wrappers, counts as part of a coder.
    """
    seen = set() if seen is None else seen
    seen.add(module)
    cls = original_class(module)
    within_coder = within_coder or (is_asked_for and is_of_known_module(cls))
    mixins = filter(None, map(mixin_of, cls.__mro__))  # a class that a user derived from a coder is one, too
    inside = within_coder or any(issubclass(mixin, Coder) for mixin in mixins)
    is_asked_for = is_asked_for and cls.__module__.split(".")[0] == "torch"
    for name, child in module.named_children():
        if child not in seen:
            yield from _parts(child, f"{path}.{name}".lstrip("."), inside, is_asked_for, seen)
    yield path, module, within_coder


def _disabled(disable: Iterable[str]) -> set[str]:
    asked = list(disable) if isinstance(disable, Iterable) and not isinstance(disable, str) else [disable]
    if not all(isinstance(name, str) for name in asked):
        raise TypeError(f"disable={disable!r}; expected names of operators")
    asked = {*asked, *filter(None, map(str.strip, os.environ.get("DCAE_FAST_DISABLE", "").split(",")))}
    unknown = asked - {"all", *OPERATORS}
    if unknown:
        raise ValueError(f"unknown operators to disable: {sorted(unknown)}; expected 'all' or some of {OPERATORS}")
    return asked


def _reason_not_fast(
    module: nn.Module,
    mixin: type[FastModule],
    disabled: set[str],
    within_coder: bool,
    sharded: bool,
    reasons: dict[nn.Module, str],
) -> str:
    """Why a module of a known class is left as it is; empty if it is made fast. reasons: of its submodules."""
    if "all" in disabled:
        return "everything is disabled"
    missing = sorted(disabled.intersection(mixin.operators))
    if missing:
        return f"{', '.join(missing)} disabled"
    if "forward" in module.__dict__ and not is_fast(module):  # which may not know the fast one
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        return f"parametrised: {', '.join(module.parametrizations)}"
    reason = unlike(mixin, module)
    if reason:
        return reason
    if issubclass(mixin, Part):
        if not within_coder:
            return "it lies outside the encoder or decoder of a DC-AE"
        reason = _unusual_weights(module, sharded)
    return reason or mixin.reason_not_fast(module) or _unsupported_parts(mixin.rests_on(module), reasons)


def _unsupported_parts(parts: dict[str, nn.Module], reasons: dict[nn.Module, str]) -> str:
    """Why none of the parts that a module rests on is fast; empty if one is, or it rests on none."""
    if not parts or any(map(is_fast, parts.values())):
        return ""
    name, part = next((item for item in parts.items() if item[1] in reasons), next(iter(parts.items())))
    return f"{name}: {reasons.get(part, f'no fast forward for {original_class(part).__name__}')}"


def _unusual_weights(module: nn.Module, sharded: bool) -> str:
    """Says of what type the weights of a module are if that is a subclass of torch.Tensor, for example quantised ones.

    Weights of other known modules in it do not count. sharded: fully_shard gives each call ordinary tensors.
    """
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        name = type(tensor).__name__
        if type(tensor) not in (nn.Parameter, torch.Tensor) and not (sharded and name == "DTensor"):
            return f"it has weights of type {name}"
    children = (child for child in module.children() if mixin_of(original_class(child)) is None)
    return next(filter(None, (_unusual_weights(child, sharded) for child in children)), "")
