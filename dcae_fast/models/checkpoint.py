"""Autoencoder checkpoints, in one of two layouts (see `convert`); how their files are found and read is in `weights`.

    original    model.safetensors; {"model_name": a name of the zoo}, else what `convert.config_to_original` gives
    diffusers   diffusion_pytorch_model.safetensors, whole or in shards; the configuration of `AutoencoderDC`

A weight file alone takes the config.json beside it, else the configuration of the zoo that its shapes fit.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dcae_fast.errors import OtherKindError

from . import convert, fields, finder, kinds, weights, zoo
from .config import DCAEConfig
from .finder import Names
from .weights import CheckpointError

WEIGHTS = {
    "original": ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
    "diffusers": [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.bin",
    ],
}


Model = TypeVar("Model", bound=nn.Module)
Build = Callable[[DCAEConfig], Model]


def load(build: Build, source: str | os.PathLike, *, config: DCAEConfig | None, **hub: Any) -> Model:
    """The model that `build`, the class DCAE, makes of a checkpoint's configuration, with the checkpoint's weights.

    For the other arguments see `DCAE.from_pretrained`. Raises CheckpointError.
    """
    finder.check_arguments(source, config, DCAEConfig)
    with finder.advised(source, zoo.how_to_get):
        return load_available(build, source, config=config, **hub)


def load_available(build: Build, source: str | os.PathLike, *, config: DCAEConfig | None = None, **hub: Any) -> Model:
    """The same, but NotDownloadedError where files are neither here nor to be downloaded."""
    file = Path(source) if os.path.isfile(source) else None
    hub_ids = {name: zoo.autoencoder_hub_id(name) for name in zoo.AUTOENCODERS}
    names = Names(kinds.AUTOENCODER, zoo.BUNDLED, hub_ids)
    find = finder.finder(source if file is None else file.parent, names, **hub)
    return load_found(build, find, source, file, config)


def load_found(
    build: Build,
    find: finder.Finder,
    source: str | os.PathLike,
    file: Path | None = None,
    config: DCAEConfig | None = None,
) -> Model:
    """The same from the files that `find` finds in `source`, or from a weight file beside them."""
    config_file = find(finder.CONFIG)
    given = weights.read_json(config_file) if config_file else {}
    if config is None and given:
        if kinds.of_config(given) == kinds.DIFFUSION_MODEL:
            raise OtherKindError(f"{config_file}: of {kinds.TAKEN_BY[kinds.DIFFUSION_MODEL]}")
        config = _parse_config(given, config_file)
    if file is None:
        # of the layout that config.json is of, or of either layout where there is no config.json
        layouts = ["diffusers" if _is_diffusers(given) else "original"] if given else list(WEIGHTS)
        file = finder.find_first(find, [name for layout in layouts for name in WEIGHTS[layout]], source)
    state = weights.read_weights(file, find)
    if kinds.of_weights(state) == kinds.DIFFUSION_MODEL:
        raise OtherKindError(f"{file}: the weights of {kinds.TAKEN_BY[kinds.DIFFUSION_MODEL]}")
    try:
        layout = convert.state_dict_layout(state)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if config is None:
        config = _infer_config(build, state, layout, file)
    expected = _empty_state(build, config)
    weights.check(state, convert.state_dict_to_diffusers(expected) if layout == "diffusers" else expected, file)
    if layout == "diffusers":
        state = convert.state_dict_from_diffusers(state, expected)
    return weights.assemble(partial(build, config), state, expected)


def save(model: nn.Module, folder: str | os.PathLike, layout: str) -> None:
    """Write a DCAE's weights, then config.json; for the arguments see `DCAE.save_pretrained`."""
    if layout not in WEIGHTS:
        raise ValueError(f"layout {layout!r}; expected one of {', '.join(WEIGHTS)}")
    state = model.state_dict()
    if layout == "diffusers":
        written = {"_class_name": "AutoencoderDC", **convert.config_to_diffusers(model.config)}
        state = convert.state_dict_to_diffusers(state)
    elif model.config == zoo.AUTOENCODERS.get(model.config.name):
        written = {"model_name": model.config.name}
    else:
        written = convert.config_to_original(model.config)
    weights.write(Path(folder), state, WEIGHTS[layout], written)


def _is_diffusers(config: Mapping) -> bool:
    return config.get("_class_name") == "AutoencoderDC"


def _parse_config(given: Mapping, path: Path) -> DCAEConfig:
    try:
        fields.Section(given).same({"_class_name": "AutoencoderDC"})  # of diffusers' models
        if _is_diffusers(given):
            return convert.config_from_diffusers(given)
        if "model_name" in given:
            return zoo.autoencoder_config(zoo.only_name(given, DCAEConfig.__annotations__))
        return convert.config_from_original(given)
    except ValueError as error:
        raise CheckpointError(f"{path}: not the configuration of a DC-AE autoencoder: {error}") from error


def _infer_config(build: Build, state: Mapping[str, torch.Tensor], layout: str, path: Path) -> DCAEConfig:
    """The configuration of the zoo that has these names and shapes; what its namesakes do not share is None."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    fits = []
    for name in zoo.AUTOENCODERS:
        expected = _empty_state(build, zoo.autoencoder_config(name))
        if layout == "diffusers":
            expected = convert.state_dict_to_diffusers(expected)
        if shapes == {name: tensor.shape for name, tensor in expected.items()}:
            fits.append(zoo.autoencoder_config(name))
    if not fits:
        raise weights.without_config(path, "no known model")
    if len(fits) == 1:
        return fits[0]
    factors = {config.scaling_factor for config in fits}
    return replace(fits[0], name=None, scaling_factor=factors.pop() if len(factors) == 1 else None)


def _empty_state(build: Build, config: DCAEConfig) -> dict[str, torch.Tensor]:
    """The model's state dict without data (on the meta device)."""
    with torch.device("meta"):
        return build(config).state_dict()
