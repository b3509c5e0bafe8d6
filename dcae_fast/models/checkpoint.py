"""Load and save autoencoder checkpoints in two layouts (see `convert`). `finder` finds the files, `weights` reads them.

    original    model.safetensors; config.json is {"model_name": a name in `zoo`} or what `convert.config_to_original`
                returns
    diffusers   diffusion_pytorch_model.safetensors, in one file or in shards; config.json is that of `AutoencoderDC`

A weight file takes its configuration from the config.json in the same folder. Without a config.json, the configuration
is that of the zoo's model with the same names and shapes.
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
    """Build the model of a checkpoint and load the checkpoint's weights. build: the class DCAE.

    See `DCAE.from_pretrained` for the other arguments. Raises CheckpointError.
    """
    finder.check_arguments(source, config, DCAEConfig)
    with finder.advised(source, zoo.how_to_get):
        return load_available(build, source, config=config, **hub)


def load_available(build: Build, source: str | os.PathLike, *, config: DCAEConfig | None = None, **hub: Any) -> Model:
    """Like `load`, but raises NotDownloadedError if files are neither in the cache nor can be downloaded."""
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
    """Like `load`, with the files that `find` finds in `source`. file: the weight file, if it is known."""
    config_file = find(finder.CONFIG)
    given = weights.read_json(config_file) if config_file else {}
    if config is None and given:
        if kinds.of_config(given) == kinds.DIFFUSION_MODEL:
            raise OtherKindError(f"{config_file}: the configuration of {kinds.LOADED_BY[kinds.DIFFUSION_MODEL]}")
        config = _parse_config(given, config_file)
    if file is None:
        # in the layout of config.json; in either layout if there is no config.json
        layouts = ["diffusers" if _is_diffusers(given) else "original"] if given else list(WEIGHTS)
        file = finder.find_first(find, [name for layout in layouts for name in WEIGHTS[layout]], source)
    state = weights.read_weights(file, find)
    if kinds.of_weights(state) == kinds.DIFFUSION_MODEL:
        raise OtherKindError(f"{file}: the weights of {kinds.LOADED_BY[kinds.DIFFUSION_MODEL]}")
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
    """Write a DCAE's weights, then config.json. See `DCAE.save_pretrained` for the arguments."""
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
        fields.Section(given).same({"_class_name": "AutoencoderDC"})  # if present, as in diffusers' models
        if _is_diffusers(given):
            return convert.config_from_diffusers(given)
        if "model_name" in given:
            return zoo.autoencoder_config(zoo.only_name(given, DCAEConfig.__annotations__))
        return convert.config_from_original(given)
    except ValueError as error:
        raise CheckpointError(f"{path}: not the configuration of a DC-AE autoencoder: {error}") from error


def _infer_config(build: Build, state: Mapping[str, torch.Tensor], layout: str, path: Path) -> DCAEConfig:
    """The configuration of the zoo's models that have these tensor names and shapes.

    If there are several such models, fields in which they differ are None.
    """
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
