"""`patch(model, precision=...)`. "int8": finds autoencoders, calibrates them, and lets their layers compute in 8 bit.
"int8", "fp8", "fp8-all": lets the linear layers of transformers compute with 8-bit rows.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import int8, rows8, scales
from .calibration import Calibration, ErrorBudget, calibrate
from .call import Coder
from .module import original_class
from .registry import mixin_of

CODERS = "encoder", "decoder"  # modules of an autoencoder


def autoencoders(components: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The autoencoder in each component that has one. Raises ValueError if a component has several."""
    found = {}
    for name, component in components.items():
        inside = [module for module in component.modules() if _is_autoencoder(module)]
        if len(inside) > 1:
            raise ValueError(f"precision='int8': {name or 'the model'} has several autoencoders; patch each by itself")
        if inside:
            found[name] = inside[0]
    return found


def _is_autoencoder(module: nn.Module) -> bool:
    mixins = [mixin_of(original_class(child)) for name, child in module.named_children() if name in CODERS]
    return len(mixins) == len(CODERS) and all(mixin is not None and issubclass(mixin, Coder) for mixin in mixins)


def _check_eval(modules: Iterable[nn.Module]) -> None:
    if any(module.training for module in modules):
        raise ValueError("precision='int8' is for inference, and the model is in training mode: call model.eval()")


def calibration_of(autoencoder: nn.Module, source: Any, budget: ErrorBudget) -> Calibration | None:
    """The calibration of a patched autoencoder; None on a device without 8-bit kernels, unless it was made elsewhere.

    source: the argument `calibration` of `patch`. Raises ValueError for a model that cannot be calibrated.
    """
    _check_eval(autoencoder.modules())
    weight = next(autoencoder.parameters())
    if weight.is_meta:
        raise ValueError("precision='int8': the weights are on the meta device: patch the model, then offload it")
    if not all(isinstance(getattr(autoencoder, name), Coder) for name in CODERS):
        raise ValueError("precision='int8': the encoder or decoder cannot be patched; see the report of patch(model)")
    if isinstance(source, Calibration):
        scales.check_weights(source, autoencoder)
        return source
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() == scales.SUFFIX:
        return scales.load(source, autoencoder)
    runs = int8.runs_on(weight.device)
    if source is None and not runs:
        return None
    from . import pictures  # imports Pillow, which is optional

    loaded = pictures.load(source, autoencoder.decoder.enlargement())  # raises the same errors on every device
    if not runs:
        return None
    x = [x.to(weight.device, weight.dtype, memory_format=torch.channels_last) for x in loaded]
    return calibrate(autoencoder, x, budget, scales.hash_of(autoencoder))


def set_int8(autoencoder: nn.Module, calibration: Calibration | None) -> tuple[str, bool]:
    """Let the layers of a patched autoencoder compute in 8 bit. Returns what the report says about it, and whether
    layers compute in 8 bit on the present device.
    """
    layers = dict(int8.candidates(autoencoder))
    found = {} if calibration is None else {n: each.scales for n, each in calibration.layers.items() if each.in_int8}
    for name in found.keys() & layers.keys():
        int8.mark(layers[name], found[name])
    runs = int8.runs_on(next(autoencoder.parameters()).device)
    lines = [] if calibration is None else [str(calibration)]
    absent = len(found.keys() - layers.keys())
    if absent:
        lines.append(f"{absent} of the {len(found)} 8-bit layers compute exactly: not patched, or with hooks.")
    in_int8 = runs and int8.is_marked(*layers.values())
    if not runs:
        lines.append("8 bit needs a Hopper GPU and Triton: on this device the model computes exactly.")
    elif not in_int8:
        lines.append("No layer computes in 8 bit: the model computes exactly.")
    return "\n".join(lines), in_int8


def check_rows8(modules: Iterable[nn.Module], precision: str, keep: Collection[str], has_autoencoder: bool) -> None:
    """Raises ValueError if patched modules cannot compute in this precision, or if a name in `keep` has no layer.

    has_autoencoder: whether an autoencoder computes in this precision, so that the model needs no transformer.
    """
    layers = [candidate for module in modules for candidate in rows8.candidates(module)]
    if not layers and not has_autoencoder:
        in_int8 = "no DC-AE with encoder and decoder, and " if precision == rows8.INT8 else ""
        raise ValueError(
            f"precision={precision!r}: the model has {in_int8}no block of UViT, USiT, DiT, SiT or SANA that is patched"
        )
    unknown = [kept for kept in keep if not any(rows8.is_named(name, kept) for name, _ in layers)]
    if unknown:
        kinds = sorted({rows8.last_part(name) for name, _ in layers})
        raise ValueError(f"keep: there is no layer {', '.join(unknown)}; expected full names, or some of {kinds}")
    if precision == rows8.INT8:
        _check_eval(layer for _, layer in layers)


def set_rows8(model: nn.Module, precision: str, keep: Collection[str]) -> tuple[str, bool]:
    """Let the linear layers of a patched model compute with 8-bit rows. Returns what the report says about it, empty if
    there are none, and whether layers compute in 8 bit on the present device.

    keep: names of layers that stay exact, see `rows8.mark`.
    """
    layers = dict(rows8.candidates(model))
    if not layers:
        return "", False
    exact = rows8.mark(layers, precision, keep)
    if not rows8.runs_on(next(iter(layers.values())).weight.device):
        return f"{precision} needs a Hopper GPU and Triton: on this device no layer computes in 8 bit.", False
    kinds = Counter(rows8.last_part(name) for name in layers.keys() - exact.keys())
    listed = ", ".join(f"{count} {name}" for name, count in sorted(kinds.items())) or "none"
    lines = [f"{precision}: {kinds.total()} of {len(layers)} linear layers compute in 8 bit ({listed})."]
    reasons = Counter((rows8.last_part(name), why) for name, why in exact.items())
    lines += [f"{count} {name} stay exact: {why}." for (name, why), count in sorted(reasons.items())]
    return "\n".join(lines), len(exact) < len(layers)
