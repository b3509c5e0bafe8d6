"""patch, unpatch, patched: swap the classes of a model's modules for fast subclasses, and back."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import families, operands, precisions, rows8  # noqa: F401, families register their classes
from .calibration import DEFAULT_BUDGET, Calibration, ErrorBudget
from .call import WholeCall, configure, release
from .judge import Budget
from .layout import Part
from .module import FastModule, change_class, class_in_use, fast_class, is_fast, original_class
from .names import register_root
from .registry import is_of_known_module, mixin_of, resemblance, unlike
from .report import Report, about_auto, missing

__all__ = ["OPERATORS", "ErrorBudget", "Report", "patch", "patched", "register_root", "unpatch"]

OPERATORS = (
    "batch_norm_act",
    "bias_act",
    "concatenate",
    "conv2d",
    "conv2d_unshuffle",
    "depthwise_glu",
    "duplicate_shuffle_add",
    "feature_distance",
    "gated_sum",
    "layer_norm",
    "linear",
    "mlp",
    "multiscale_qkv",
    "packed_attention",
    "relu_linear_attention",
    "res_block",
    "rms_norm",
    "rms_norm_conv2d",
    "unshuffle_average_add",
    "upsample_conv2d",
)


def patch(
    model: Any,
    disable: Iterable[str] = (),
    cuda_graphs: bool | Literal["auto"] = "auto",
    max_memory: int | None = None,
    frozen: bool = False,
    graph_memory: int = 2**30,
    precision: Literal["exact", "int8", "fp8", "fp8-all"] = "exact",
    calibration: Any = None,
    error_budget: ErrorBudget = DEFAULT_BUDGET,
    keep: Iterable[str] = (),
) -> Report:
    """Make a DC-AE and the diffusion transformers on its latents fast.

    model: an nn.Module, or a pipeline, which is any object with a dictionary `components`; the modules among these are
    patched. Known are this project's models, diffusers' `AutoencoderDC`, `SanaTransformer2DModel` and
    `SanaControlNetModel`, NVlabs/Sana's transformer, and the original of DC-Gen and efficientvit, also as
    a copy inside another package (`register_root`).

    Every module whose exact class is known gets a subclass with a fast forward; parameters, buffers, names and hooks
    stay. `patch` leaves the following modules as they are, and the report gives the reason for each:
    - a module that needs an operator named in `disable`, or in the environment variable DCAE_FAST_DISABLE ("all", or
      names separated by commas). If the module was patched before, it gets its own forward back;
    - a module that can never take its fast forward, because of an option, an activation, a norm or a type of weights;
    - a block of an encoder or decoder inside a model of another kind. Patch the block itself to make it fast;
    - a module that resembles a known class but has another one;
    - a module whose forward was replaced on the instance before. A forward that is replaced afterwards, for example
      by torch.compile(module.forward), calls the fast forward until `unpatch`.
    Patching twice has the effect of the second call: its options replace the former ones.

    cuda_graphs="auto": an inference call of a patched encoder, decoder or transformer that is short on the GPU is
    captured as a CUDA graph, which later calls with the same shapes and types replay. The second such call is timed,
    without waiting for the GPU. If the GPU takes at most 1.5 times as long as Python needs to issue the call, a later
    call is captured. Calls that get no graph for lack of memory are considered again after 16 more calls, then after
    32, up to 1024. Each time that weights move, twice as many calls are needed. The steps of `DCAEDiffusion.generate`
    are calls in this sense. The transformer of a diffusers pipeline is captured only if it is patched on its own.
    cuda_graphs=True: every such call is captured when it is made the second time. Each module keeps at most eight
    graphs and the memory that the graphs compute in. cuda_graphs=False: no call is captured.
    graph_memory: bytes that the graphs of "auto" hold at most, in all modules of the model or pipeline together: the
    memory they compute in, their inputs and outputs. Weights that autocast casts for a transformer come on top. A
    capture takes at most half of the GPU's free memory.
    max_memory: bytes that an encoder or decoder may allocate in an inference call, including the result. A call that
    needs more computes a few images at a time, and computes layers that do not fit in bands of rows. The result is the
    same up to rounding. None: the free memory of the GPU, no bound on a CPU.
    frozen: promise that the weights stay as they are until the next `patch` or `unpatch`. Inference then keeps what it
    derives from weights: channels-last copies, folded batch norms, casts under autocast. These tensors are never part
    of `state_dict`. `unpatch`, `load_state_dict`, `to`, calls with gradients on, deepcopy and pickle drop them. An
    in-place change that autograd's version counter counts is noticed, and the tensors are derived again. Other writes
    are not noticed: writes through `.data`, and on a GPU the updates of PyTorch's moving averages (`AveragedModel`
    with get_ema_multi_avg_fn). Under torch.compile nothing is kept.

    precision: "int8" lets convolutions and linear layers of encoders and decoders compute in 8 bit, for inference on a
    Hopper GPU; the first and the last layer stay exact. Results differ from exact ones within `error_budget`, on the
    pictures of the calibration. `load_state_dict` makes an autoencoder exact again, and so does a change of its dtype.
    calibration: pictures to calibrate 8-bit layers on: a tensor [B, 3, H, W] in [-1, 1], a picture file, a folder, or a
    list of these; None for the bundled photograph. A .safetensors file that `report.save_scales` wrote replaces the
    calibration, and so does `report.calibration` of a model with the same weights.
    error_budget: the largest error by 8 bit. Layers that would exceed it stay exact; the report names them.

    precision: "int8" and "fp8" let linear layers in the blocks of UViT, USiT, DiT, SiT and SANA compute in 8 bit, in
    half precision or under autocast, on a Hopper GPU: the projections of attention, the MLP and the long skips, of
    SANA also the 1×1 convolutions. "fp8" rounds to 8-bit floating point; "int8" rounds less. Nothing is calibrated.
    `load_state_dict` keeps this precision. For layers with other channels than multiples of 16, the model computes as
    without it, and the report says so. `frozen` also keeps the 8-bit weights. In training, "fp8" computes the gradients
    of the layers' inputs as 8-bit products too, and "fp8-all" also the gradients of the weights.
    keep: names of layers of a transformer that stay exact, in full, or their last part, such as "fc2".

    "int8" is for inference and implies frozen: a call with gradients on or in training mode raises RuntimeError. A
    model or pipeline with an autoencoder and a transformer computes both in int8; to change only one, patch it by
    itself. `deepcopy` and pickle keep 8 bit. On other devices the model computes exactly, and the report says so.

    Returns a report that prints as a table. Raises TypeError for a model or an option of another type. Raises
    ValueError for an unknown operator or precision, for a number of bytes that is not positive, and for frozen=True
    with weights that FSDP shards; for precision="int8" in training mode, without an autoencoder and a transformer, with
    pictures that cannot be read, and with an autoencoder whose weights are on the meta device, whose encoder or decoder
    cannot be patched, or that is one of several in the model or a component; for `calibration` or `error_budget`
    without precision="int8" and an autoencoder; for precision="fp8" without a transformer, for a name in `keep` without
    a layer, and for `keep` without 8 bit. Raises CheckpointError for scales of other weights.
    """
    components, disabled = _components(model), _disabled(disable)
    if not isinstance(cuda_graphs, bool) and cuda_graphs != "auto":
        raise TypeError(f"cuda_graphs={cuda_graphs!r}; expected True, False or 'auto'")
    if not isinstance(frozen, bool):
        raise TypeError(f"frozen={frozen!r}; expected True or False")
    if max_memory is not None:
        _check_bytes("max_memory", max_memory, " or None")
    _check_bytes("graph_memory", graph_memory)
    keep = _check_precision(precision, calibration, error_budget, keep)
    frozen = frozen or precision == rows8.INT8
    if frozen and any(map(_is_sharded, _modules(model))):
        option = "precision='int8'" if precision == rows8.INT8 else "frozen=True"
        raise ValueError(f"{option}: FSDP shards the weights of this model, and gathers them again in every call")
    if components is not None and not components:
        return Report(note=f"{type(model).__name__} has no component that is a module: nothing was patched.")
    modules = {"": model} if components is None else components
    found, calibrations = {}, {}
    if precision == rows8.INT8:
        found = precisions.autoencoders(modules)
        if not found and (calibration is not None or error_budget != DEFAULT_BUDGET):
            raise ValueError("calibration and error_budget are for a DC-AE with encoder and decoder: found none")
    if precision != "exact":
        with patched(model, disable, cuda_graphs=False, max_memory=max_memory, frozen=frozen):
            precisions.check_rows8(modules.values(), precision, keep, bool(found))
            for each in found.values():
                if each not in calibrations:
                    calibrations[each] = precisions.calibration_of(each, calibration, error_budget)
    options = disabled, cuda_graphs, max_memory, frozen, Budget(graph_memory)
    keeps_classes = cuda_graphs is False if components is None else cuda_graphs is not True
    made = {}  # two components may be the same module
    for name, each in modules.items():
        if each not in made:
            autoencoder = found.get(name)
            made[each] = _patch(each, *options, autoencoder, calibrations.get(autoencoder), keeps_classes=keeps_classes)
            if precision != "exact":
                _set_rows8(each, made[each], precision, keep)
    reports = {name: made[each] for name, each in modules.items()}
    return reports[""] if components is None else Report.of_components(reports)


def _set_rows8(model: nn.Module, report: Report, precision: str, keep: tuple[str, ...]) -> None:
    """Let the linear layers of transformers in a patched model compute in 8 bit, and report it."""
    text, in_8_bit = precisions.set_rows8(model, precision, keep)
    report.precision = "\n".join(filter(None, (report.precision, text)))
    if precision == rows8.INT8:
        report.in_int8 |= in_8_bit
    else:
        report.in_float8 |= in_8_bit


def _check_precision(precision: Any, calibration: Any, error_budget: Any, keep: Any) -> tuple[str, ...]:
    """Raises ValueError or TypeError unless the arguments of `patch` fit together. Returns keep."""
    known = "exact", *rows8.TYPES
    if precision not in known:
        raise ValueError(f"precision={precision!r}; expected one of {known}")
    if not isinstance(error_budget, ErrorBudget):
        raise TypeError(f"error_budget={error_budget!r}; expected a dcae_fast.ErrorBudget")
    if precision != rows8.INT8 and (calibration is not None or error_budget != DEFAULT_BUDGET):
        raise ValueError(f"calibration and error_budget are for precision='int8', and precision is {precision!r}")
    names = tuple(keep) if isinstance(keep, Iterable) and not isinstance(keep, str) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"keep={keep!r}; expected names of layers")
    if names and precision == "exact":
        raise ValueError("keep is for a precision of 8 bit, and precision is 'exact'")
    return names


def _check_bytes(name: str, value: Any, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}; expected a number of bytes, an integer{alternative}")
    if value <= 0:
        raise ValueError(f"{name}={value}; expected a positive number of bytes")


def _patch(
    model: nn.Module,
    disabled: set[str],
    cuda_graphs: bool | str,
    max_memory: int | None,
    frozen: bool,
    budget: Budget,
    autoencoder: nn.Module | None = None,
    calibration: Calibration | None = None,
    keeps_classes: bool = False,
) -> Report:
    """autoencoder: the part of the model to compute in 8 bit, as `calibration` says; None computes exactly.

    keeps_classes: modules whose fast class is only for graphs keep their own class.
    """
    report, reasons = Report(), {}
    sharded = any(map(_is_sharded, model.modules()))
    operands.unfreeze(model)
    for path, module, within_coder in _parts(model):
        cls = original_class(module)
        mixin = mixin_of(cls)
        if mixin is not None and issubclass(mixin, WholeCall) and keeps_classes and mixin.only_for_graphs:
            reason, mixin = "", None
            release(module)
            change_class(module, cls)
        elif mixin is None:
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
            if issubclass(mixin, WholeCall):
                configure(module, cuda_graphs, max_memory, budget)
                report.graphs = about_auto(budget.limit) if cuda_graphs == "auto" else ""
            if frozen:
                operands.freeze(module)
    if autoencoder is not None:
        report.calibration = calibration
        report.precision, report.in_int8 = precisions.set_int8(autoencoder, calibration)
    known = report.replaced or report.skipped
    unknown = f"{type(model).__name__} has no module of a DC-AE that is known here: nothing was patched."
    report.note = missing() if known else unknown
    return report


def _is_sharded(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def unpatch(model: Any) -> None:
    """Give every patched module of a model or pipeline its own class back."""
    for module in _modules(model):
        if is_fast(module):
            release(module)
            operands.unfreeze(module)
            change_class(module, original_class(module))


@contextlib.contextmanager
def patched(
    model: Any,
    disable: Iterable[str] = (),
    cuda_graphs: bool | Literal["auto"] = "auto",
    max_memory: int | None = None,
    frozen: bool = False,
    graph_memory: int = 2**30,
    precision: Literal["exact", "int8", "fp8", "fp8-all"] = "exact",
    calibration: Any = None,
    error_budget: ErrorBudget = DEFAULT_BUDGET,
    keep: Iterable[str] = (),
) -> Iterator[Report]:
    """`patch` for a scope, with the same arguments. At its end each module has its former class and options again.

    Graphs and operands from before the scope are used again afterwards.
    """
    modules = _modules(model)
    before = [(module, class_in_use(module), _take_state(module)) for module in modules]
    changed = []
    try:
        options = cuda_graphs, max_memory, frozen, graph_memory, precision, calibration, error_budget, keep
        report = patch(model, disable, *options)
        changed += [(module, cls) for module, cls, _ in before if class_in_use(module) is not cls]
        yield report
    finally:
        for module, cls in changed:
            change_class(module, cls)
        for module, _, state in before:
            release(module)
            _take_state(module)
            vars(module).update(state)


def _take_state(module: nn.Module) -> dict[str, Any]:
    """Remove from a module what `patch` has added, and return it."""
    added = vars(module).keys() & {"fast_options", operands.FROZEN, operands.ATTRIBUTE, operands.INT8, operands.ROWS8}
    return {name: vars(module).pop(name) for name in added}


def _components(model: Any) -> dict[str, nn.Module] | None:
    """The modules among the components of a pipeline; None for a module. Raises TypeError for anything else."""
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
    """Yields (path, module, whether it is inside an encoder, decoder or transformer) for a module and its submodules,
    last itself.

    A block that is patched itself, or inside PyTorch's own containers and wrappers, counts as inside one.
    """
    seen = set() if seen is None else seen
    seen.add(module)
    cls = original_class(module)
    within_coder = within_coder or (is_asked_for and is_of_known_module(cls))
    mixins = filter(None, map(mixin_of, cls.__mro__))  # a class that a user derived from a coder counts as well
    inside = within_coder or any(issubclass(mixin, WholeCall) for mixin in mixins)
    is_asked_for = is_asked_for and cls.__module__.split(".")[0] == "torch"
    for name, child in module.named_children():
        if child not in seen:
            yield from _parts(child, f"{path}.{name}".lstrip("."), inside, is_asked_for, seen)
    yield path, module, within_coder


def _disabled(disable: Iterable[str]) -> set[str]:
    asked = list(disable) if isinstance(disable, Iterable) and not isinstance(disable, str) else [disable]
    if not all(isinstance(name, str) for name in asked):
        raise TypeError(f"disable={disable!r}; expected names of operators")
    return _known("disable", asked) | disabled_by_environment()


def disabled_by_environment() -> set[str]:
    """The operators that the environment variable DCAE_FAST_DISABLE names. Raises ValueError for an unknown name."""
    return _known("DCAE_FAST_DISABLE", filter(None, map(str.strip, os.environ.get("DCAE_FAST_DISABLE", "").split(","))))


def _known(source: str, names: Iterable[str]) -> set[str]:
    """The names as a set. source: where they were given. Raises ValueError for an unknown operator."""
    unknown = set(names := list(names)) - {"all", *OPERATORS}
    if unknown:
        raise ValueError(f"{source}: unknown operators {sorted(unknown)}; expected 'all' or some of {OPERATORS}")
    return set(names)


def _reason_not_fast(
    module: nn.Module,
    mixin: type[FastModule],
    disabled: set[str],
    within_coder: bool,
    sharded: bool,
    reasons: dict[nn.Module, str],
) -> str:
    """Why a module of a known class is skipped; empty if it is made fast. reasons: for its submodules."""
    if "all" in disabled:
        return "everything is disabled"
    missing = sorted(disabled.intersection(mixin.operators))
    if missing:
        return f"{', '.join(missing)} disabled"
    if "forward" in module.__dict__ and not is_fast(module):  # and may not call the fast one
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
    """Why none of the parts that a module rests on is fast; empty if one is, or if there are no such parts."""
    if not parts or any(map(is_fast, parts.values())):
        return ""
    name, part = next((item for item in parts.items() if item[1] in reasons), next(iter(parts.items())))
    return f"{name}: {reasons.get(part, f'no fast forward for {original_class(part).__name__}')}"


def _unusual_weights(module: nn.Module, sharded: bool) -> str:
    """Names the type of a module's weights if it is a subclass of torch.Tensor, such as a quantised tensor; else empty.

    Weights of other known modules inside do not count. sharded: fully_shard gives each call ordinary tensors.
    """
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        name = type(tensor).__name__
        if type(tensor) not in (nn.Parameter, torch.Tensor) and not (sharded and name == "DTensor"):
            return f"it has weights of type {name}"
    children = (child for child in module.children() if mixin_of(original_class(child)) is None)
    return next(filter(None, (_unusual_weights(child, sharded) for child in children)), "")
