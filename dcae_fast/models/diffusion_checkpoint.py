"""Load and save checkpoints of diffusion models. `finder` finds the files, `weights` reads them.

    repository   model.safetensors, names with prefix "diffusion_model."; config.json is {"model_name": a name in
                 `diffusion_zoo`} or what `diffusion_zoo.config_to_json` returns; autoencoder/ may hold its autoencoder
    training     a .pt of the original trainer: model_state_dict and ema = {decay: moving average}, prefix "0."

A weight file takes its configuration from the config.json in the same folder. Without a config.json, the configuration
is that of the zoo's model with the same names and shapes.
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dcae_fast.errors import NotDownloadedError, OtherKindError

from . import checkpoint, diffusion_zoo, finder, kinds, weights, zoo
from .autoencoder import DCAE
from .diffusion_zoo import DiffusionConfig
from .dit import DiT, DiTConfig, position_table
from .finder import Names
from .uvit import UViT
from .weights import CheckpointError

FILES = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "checkpoint.pt"]
AUTOENCODER = "autoencoder"
PREFIX = "diffusion_model."
PREFIXES = (PREFIX, "0.", "uvit.", "dit.")  # of all names; the original has changed it over time


def load(
    source: str | os.PathLike,
    *,
    config: DiffusionConfig | None,
    autoencoder: str | os.PathLike | None,
    ema: bool,
    revision: str | None,
    **cache: Any,
) -> tuple[DiffusionConfig, UViT | DiT, DCAE]:
    """Return the configuration, the network and the autoencoder, both in float32 and in evaluation mode.

    See `DCAEDiffusion.from_pretrained` for the arguments. Raises CheckpointError.
    """
    finder.check_arguments(source, config, DiffusionConfig)
    with finder.advised(source, diffusion_zoo.how_to_get):
        file = Path(source) if os.path.isfile(source) else None
        hub_ids = {name: diffusion_zoo.diffusion_hub_id(name) for name in diffusion_zoo.DIFFUSION_MODELS}
        names = Names(kinds.DIFFUSION_MODEL, diffusion_zoo.BUNDLED, hub_ids)
        find = finder.finder(source if file is None else file.parent, names, revision=revision, **cache)
        config, network = _load_network(find, source, file, config, ema)
        return config, network, _load_autoencoder(find, source, config, autoencoder, cache)


def _load_network(
    find: finder.Finder, source: str | os.PathLike, file: Path | None, config: DiffusionConfig | None, ema: bool
) -> tuple[DiffusionConfig, UViT | DiT]:
    config_file = find(finder.CONFIG)
    if config is None and config_file:
        config = _parse_config(weights.read_json(config_file), config_file)
    file = file or finder.find_first(find, FILES, source)
    state = _without_prefix(weights.read_weights(file, find, partial(_unwrap, ema=ema)))
    config = config or _infer_config(state, file)
    expected = _empty_state(config)
    state = _with_positions(state, config, expected)
    weights.check(state, expected, file)
    if state["pos_embed"].is_meta:
        network = config.network
        state["pos_embed"] = position_table(network.hidden_size, network.input_size // network.patch_size)
    return config, weights.assemble(config.build, state, expected)


def save(config: DiffusionConfig, network: UViT | DiT, folder: str | os.PathLike) -> None:
    """Write the network's weights, then config.json, in the layout of a repository."""
    save_state(config, network.state_dict(), folder)


def save_state(config: DiffusionConfig, state: weights.State, folder: str | os.PathLike) -> None:
    """Like `save`, with the network's state dict."""
    state = {PREFIX + name: tensor for name, tensor in state.items()}
    weights.write(Path(folder), state, FILES, diffusion_zoo.config_to_json(config))


def _load_autoencoder(
    find: finder.Finder,
    source: str | os.PathLike,
    config: DiffusionConfig,
    given: str | os.PathLike | None,
    cache: dict[str, Any],
) -> DCAE:
    """The given autoencoder, else the one in the checkpoint, else the one that the configuration names."""
    if given is not None:
        return DCAE.from_pretrained(given, **cache)
    try:
        is_inside = find(f"{AUTOENCODER}/{finder.CONFIG}") is not None
    except NotDownloadedError:
        is_inside = False
    if is_inside:
        return checkpoint.load_found(DCAE, lambda file: find(f"{AUTOENCODER}/{file}"), f"{source}/{AUTOENCODER}")
    if not os.path.exists(source):
        return checkpoint.load_available(DCAE, config.autoencoder, **cache)
    folder = Path(source) if os.path.isdir(source) else Path(source).parent
    with finder.advised(config.autoencoder, partial(zoo.how_to_get, place=folder / AUTOENCODER)):
        return checkpoint.load_available(DCAE, config.autoencoder, **cache)


def _unwrap(content: Any, ema: bool) -> Any:
    """The state dict in a file of the original trainer. ema: prefer the (first) moving average, if there is one."""
    if not isinstance(content, dict):
        return content
    averages = content.get("ema") or content.get("ema_model_state_dict")
    if ema and isinstance(averages, dict):
        return next(iter(averages.values()))
    return content.get("model_state_dict") or weights.under_state_dict(content)


def _without_prefix(state: weights.State) -> weights.State:
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _with_positions(state: weights.State, config: DiffusionConfig, expected: weights.State) -> weights.State:
    """The state with a placeholder on the meta device for DiT's position table, if the table is absent.

    The table is not trained; the original trainer does not save it.
    """
    return {"pos_embed": expected["pos_embed"]} | state if isinstance(config.network, DiTConfig) else state


def _parse_config(given: Mapping[str, Any], path: Path) -> DiffusionConfig:
    if kinds.of_config(given) == kinds.AUTOENCODER:
        raise OtherKindError(f"{path}: the configuration of {kinds.LOADED_BY[kinds.AUTOENCODER]}")
    try:
        return diffusion_zoo.config_from_json(given)
    except ValueError as error:
        raise CheckpointError(f"{path}: not the configuration of a diffusion model: {error}") from error


def _infer_config(state: weights.State, path: Path) -> DiffusionConfig:
    """The configuration of the zoo's model that has these tensor names and shapes."""
    fits = []
    for name in diffusion_zoo.DIFFUSION_MODELS:
        config = diffusion_zoo.diffusion_config(name)
        expected = _empty_state(config)
        have = _with_positions(state, config, expected)
        if {k: v.shape for k, v in have.items()} == {k: v.shape for k, v in expected.items()}:
            fits.append(config)
    if not fits and kinds.of_weights(state) == kinds.AUTOENCODER:
        raise OtherKindError(f"{path}: the weights of {kinds.LOADED_BY[kinds.AUTOENCODER]}")
    if not fits:
        raise weights.without_config(path, "no known model")
    if len(set(fits)) > 1:
        names = ", ".join(config.name for config in fits)
        raise weights.without_config(path, names)
    return fits[0]


def _empty_state(config: DiffusionConfig) -> weights.State:
    """The network's state dict without data (on the meta device)."""
    with torch.device("meta"):
        return config.build().state_dict()
