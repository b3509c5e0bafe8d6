"""The released autoencoders: name → configuration, and their repositories.

Architectures and scaling factors come from the original's model registry (DC-Gen), its README and the diffusers
repositories. A scaling factor that none of them gives is None.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dcae_fast.errors import CheckpointError

from . import convert, fields
from .config import CoderConfig, DCAEConfig

WIDTH = (128, 256, 512, 512, 1024, 1024, 2048, 2048)


def _coder(depth: tuple[int, ...], deep: str = "ResBlock", **options) -> CoderConfig:
    """ResBlocks in the first three stages, `deep` blocks in the others. Default: RMS norm and SiLU."""
    stages = len(depth)
    default = {
        "width": WIDTH[:stages],
        "block": ("ResBlock",) * 3 + (deep,) * (stages - 3),
        "norm": ("rms",) * stages,
        "act": ("silu",) * stages,
    }
    return CoderConfig(depth=depth, **(default | options))


def _imagenet(stages: int, latent_channels: int, scaling_factor: float | None = None) -> DCAEConfig:
    norm = ("batch",) * 3 + ("rms",) * (stages - 3)
    act = ("relu",) * 3 + ("silu",) * (stages - 3)
    return DCAEConfig(
        latent_channels,
        encoder=_coder((0, 4, 8) + (2,) * (stages - 3), "EViTGLU"),
        decoder=_coder((0, 5, 10) + (2,) * (stages - 3), "EViTGLU", norm=norm, act=act),
        scaling_factor=scaling_factor,
    )


def _adaptive(width: tuple[int, ...], scaling_factor: float | None = None) -> DCAEConfig:
    depth = (0, 5, 10) + (4,) * (len(width) - 3)
    return DCAEConfig(
        latent_channels=128,
        encoder=_coder(depth, width=width, shortcut=False),
        decoder=_coder(depth, width=width, shortcut=False, head_act="silu"),
        adaptive=True,
        scaling_factor=scaling_factor,
    )


_SANA = DCAEConfig(
    latent_channels=32,
    encoder=_coder((2, 2, 2, 3, 3, 3), "EViTS5GLU", resample="conv"),
    decoder=_coder((3, 3, 3, 3, 3, 3), "EViTS5GLU", resample="interpolate"),
    scaling_factor=0.41407,
)

AUTOENCODERS = {
    "dc-ae-f32c32-in-1.0": _imagenet(6, 32, 0.3189),
    "dc-ae-f64c128-in-1.0": _imagenet(7, 128, 0.2889),
    "dc-ae-f128c512-in-1.0": _imagenet(8, 512),
    "dc-ae-f32c32-mix-1.0": _imagenet(6, 32, 0.4552),
    "dc-ae-f64c128-mix-1.0": _imagenet(7, 128, 0.4538),
    "dc-ae-f128c512-mix-1.0": _imagenet(8, 512),
    "dc-ae-f32c32-in-1.0-256px": _imagenet(6, 32),
    "dc-ae-f32c32-sana-1.0": _SANA,
    "dc-ae-f32c32-sana-1.1": _SANA,
    "dc-ae-lite-f32c32-sana-1.1": replace(_SANA, decoder=_coder((0, 3, 5, 4, 4, 4), head_act="silu")),
    "dc-ae-f32c128-1.5": _adaptive(WIDTH[:6]),
    "dc-ae-f64c128-1.5": _adaptive(WIDTH[:6] + (1024,), 0.5935),
}

BUNDLED = {"dc-ae-tiny": Path(__file__).parents[1] / "assets" / "dc-ae-tiny"}


def autoencoder_names() -> list[str]:
    """All names that `autoencoder_config` knows. Those in `BUNDLED` are in this package, others are downloaded."""
    return [*AUTOENCODERS, *BUNDLED]


def autoencoder_config(name: str) -> DCAEConfig:
    """The configuration of an autoencoder of the zoo. ValueError, which lists all names, for an unknown one."""
    check_name("autoencoder", name, autoencoder_names())
    if name in BUNDLED:
        return convert.config_from_original(bundled_config(BUNDLED[name]))
    return replace(AUTOENCODERS[name], name=name)


def autoencoder_hub_id(name: str) -> str | None:
    """The Hugging Face repository with the original weights; None if bundled, ValueError for an unknown name."""
    check_name("autoencoder", name, autoencoder_names())
    if name in BUNDLED:
        return None
    return f"dc-ai/{name}" if name.endswith("-1.5") else f"mit-han-lab/{name}"


def check_name(kind: str, name: Any, names: list[str]) -> None:
    """Raise TypeError unless the name is a string, ValueError unless it is one of `names`. kind: of these models."""
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}; expected the name of a model, a string")
    if name not in names:
        raise ValueError(unknown_name(kind, name, names))


def unknown_name(kind: str, name: str, names: list[str]) -> str:
    """The error message for a name that is not one of `names`."""
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {name!r}; {hint}Known: {', '.join(names)}"


def bundled_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model that is part of this package. Raises CheckpointError if the file is missing."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: this file of dcae_fast is missing or damaged; install the package again"
        ) from error


def only_name(given: Mapping[str, Any], others: Collection[str]) -> str:
    """The model_name of a config.json. FieldError if one of the fields that the name decides is given too."""
    for name in others:
        if name in given:
            raise fields.FieldError(name, given[name], f"nothing beside model_name={given['model_name']!r}")
    fields.text("model_name", given["model_name"])
    return given["model_name"]


def how_to_get(source: str, place: Path | None = None) -> str:
    """Advice how to get an autoencoder, of the zoo or of a repository, that cannot be downloaded now.

    place: the folder where the caller looks for it first.
    """
    repository, folder = (autoencoder_hub_id(source) if source in AUTOENCODERS else source), source.split("/")[-1]
    target = f"name ./{folder} in place of {source}" if place is None else f"put it at {place}"
    return f"""Weights are downloaded on first use. On a machine with an internet connection, run

    hf download {repository} --local-dir {folder}

Copy the folder, which contains config.json and model.safetensors, to this machine, and {target}."""
