"""Autoencoder checkpoints: found, read, checked and written.

A folder or Hugging Face repository holds weights and a config.json in one of two layouts (see `convert`):

    original    model.safetensors; {"model_name": a name of the zoo}, else what `convert.config_to_original` gives
    diffusers   diffusion_pytorch_model.safetensors, whole or in shards; the configuration of `AutoencoderDC`

A weight file alone takes the config.json beside it, else the configuration of the zoo that its shapes fit.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dcae_fast.files import written_atomically

from . import convert, zoo
from .autoencoder import DCAE, DCAEConfig

CONFIG = "config.json"
WEIGHTS = {
    "original": ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"],
    "diffusers": [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.bin",
    ],
}
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
LISTED = 10  # names of each kind in an error


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be found, read, or loaded into this model."""


Finder = Callable[[str], Path | None]


def load(
    source: str | os.PathLike,
    *,
    revision: str | None,
    cache_dir: str | os.PathLike | None,
    local_files_only: bool,
    config: DCAEConfig | None,
) -> tuple[DCAEConfig, dict[str, torch.Tensor]]:
    """The configuration and the complete, checked state dict (original layout, float32) of a checkpoint.

    For the arguments see `DCAE.from_pretrained`. Raises CheckpointError.
    """
    weights = Path(source) if os.path.isfile(source) else None
    find = _finder(source if weights is None else weights.parent, revision, cache_dir, local_files_only)
    config_file = find(CONFIG)
    given = _read_json(config_file) if config_file else {}
    if config is None and given:
        config = _parse_config(given, config_file)
    if weights is None:
        weights = _find_weights(find, source, given)
    state = _read_weights(weights, find)
    try:
        layout = convert.state_dict_layout(state)
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from None
    if config is None:
        config = _infer_config(state, layout, weights)
    expected = _empty_state(config)
    _check(state, convert.state_dict_to_diffusers(expected) if layout == "diffusers" else expected, weights)
    if layout == "diffusers":
        state = convert.state_dict_from_diffusers(state, expected)
    return config, {name: state[name].to(tensor.dtype) for name, tensor in expected.items()}


def save(model: DCAE, folder: str | os.PathLike, layout: str) -> None:
    """Writes the weights, then config.json; for the arguments see `DCAE.save_pretrained`."""
    if layout not in WEIGHTS:
        raise ValueError(f"layout {layout!r}; expected one of {', '.join(WEIGHTS)}")
    folder, state = Path(folder), model.state_dict()
    if layout == "diffusers":
        written = {"_class_name": "AutoencoderDC", **convert.config_to_diffusers(model.config)}
        state = convert.state_dict_to_diffusers(state)
    elif model.config == zoo.AUTOENCODERS.get(model.config.name):
        written = {"model_name": model.config.name}
    else:
        written = convert.config_to_original(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    with written_atomically(folder / WEIGHTS[layout][0]) as path:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    (folder / WEIGHTS[layout][1]).unlink(missing_ok=True)  # the index of older shards, which diffusers would prefer
    with written_atomically(folder / CONFIG) as path:
        path.write_text(json.dumps(written, indent=2) + "\n")


def _finder(source: str | os.PathLike, revision: str | None, cache_dir, local_files_only: bool) -> Finder:
    """A function from a file name to its path in the source, or None where the source has no such file."""
    name = os.fspath(source)
    folder = zoo.BUNDLED.get(name, Path(name)) if not os.path.isdir(name) else Path(name)
    if folder.is_dir():
        return lambda file: folder / file if (folder / file).is_file() else None
    if name in zoo.AUTOENCODERS:
        name = zoo.autoencoder_hub_id(name)
    elif os.path.isabs(name) or name.startswith(".") or name.endswith((".safetensors", ".json", *PICKLES)):
        raise CheckpointError(f"no such file or folder: {name}")
    elif name.count("/") != 1:
        raise CheckpointError(f"no such file or folder, nor a Hugging Face repository: {zoo.unknown(name)}")

    def find(file: str) -> Path | None:
        options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            return Path(hf_hub_download(name, file, **options))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and file == CONFIG:  # no connection, and never downloaded
                raise CheckpointError(f"{name}: not in the local cache, and not to be downloaded: {error}") from error
            return None
        except (OSError, ValueError) as error:  # no such repository or revision, no access, not a repository's name
            raise CheckpointError(f"{name} is no local folder, and as a Hugging Face repository: {error}") from error

    return find


def _find_weights(find: Finder, source: str | os.PathLike, config: Mapping) -> Path:
    """The weights of the layout that config.json is of, or of either layout where there is no config.json."""
    layouts = ["diffusers" if _is_diffusers(config) else "original"] if config else list(WEIGHTS)
    names = [name for layout in layouts for name in WEIGHTS[layout]]
    for path in map(find, names):
        if path is not None:
            return path
    raise CheckpointError(f"{os.fspath(source)}: no weights; looked for {', '.join(names)}")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: expected a JSON object with at least one entry")
    return content


def _read_weights(path: Path, find: Finder) -> dict[str, torch.Tensor]:
    if path.name.endswith(".index.json"):
        return _read_shards(path, find)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file (truncated?): {error}") from error
    if path.suffix not in PICKLES:
        raise CheckpointError(f"{path}: unknown kind of file; expected .safetensors, {', '.join(PICKLES)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle may raise anything
        raise CheckpointError(f"{path}: not a readable file of weights alone: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a state dict")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: not a plain state dict, nor one under 'state_dict'; no tensors at {_listed(others)} "
            f"of the keys {_listed(list(map(str, content)))}"
        )
    return content


def _read_shards(path: Path, find: Finder) -> dict[str, torch.Tensor]:
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
        raise CheckpointError(f"{path}: expected a weight_map from names to files beside it")
    state = {}
    for shard in sorted(set(shards.values())):
        found = find(shard)
        if found is None:
            raise CheckpointError(f"{path}: the shard {shard} is missing")
        state |= _read_weights(found, find)
    return state


def _is_diffusers(config: Mapping) -> bool:
    return config.get("_class_name") == "AutoencoderDC"


def _parse_config(given: Mapping, path: Path) -> DCAEConfig:
    try:
        if _is_diffusers(given):
            return convert.config_from_diffusers(given)
        if "model_name" in given:
            return zoo.autoencoder_config(given["model_name"])
        return convert.config_from_original(given)
    except KeyError as error:
        raise CheckpointError(f"{path}: not the configuration of a DC-AE autoencoder, {error} is absent") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not the configuration of a DC-AE autoencoder: {error}") from error


def _infer_config(state: Mapping[str, torch.Tensor], layout: str, path: Path) -> DCAEConfig:
    """The configuration of the zoo that has these names and shapes; what its namesakes do not share is None."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    fits = []
    for name in zoo.AUTOENCODERS:
        expected = _empty_state(zoo.autoencoder_config(name))
        if layout == "diffusers":
            expected = convert.state_dict_to_diffusers(expected)
        if shapes == {name: tensor.shape for name, tensor in expected.items()}:
            fits.append(zoo.autoencoder_config(name))
    if not fits:
        raise CheckpointError(f"{path}: no config.json beside it, and of the shape of no known model; give config=")
    if len(fits) == 1:
        return fits[0]
    factors = {config.scaling_factor for config in fits}
    return replace(fits[0], name=None, scaling_factor=factors.pop() if len(factors) == 1 else None)


def _empty_state(config: DCAEConfig) -> dict[str, torch.Tensor]:
    """The model's state dict without data (on the meta device)."""
    with torch.device("meta"):
        return DCAE(config).state_dict()


def _check(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path) -> None:
    """CheckpointError with all that is missing, unexpected, or of another shape or kind."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    misfits = []
    for name, want in expected.items():
        have = state.get(name, want)
        if have.shape != want.shape:
            misfits.append(f"{name} {list(have.shape)} instead of {list(want.shape)}")
        elif have.is_floating_point() != want.is_floating_point():
            misfits.append(f"{name} {have.dtype} instead of {want.dtype}")
    problems = {"missing": missing, "unexpected": unexpected, "unfit": misfits}
    found = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError("\n  ".join([f"{path} does not fit the model:", *found]))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
