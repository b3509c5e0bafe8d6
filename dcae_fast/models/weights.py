"""Files of checkpoints: found in a folder or a Hugging Face repository, read, checked against a model, and written."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dcae_fast.errors import CheckpointError
from dcae_fast.files import written_atomically

from . import zoo

CONFIG = "config.json"
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
LISTED = 10  # names of each kind in an error

State = dict[str, torch.Tensor]
Finder = Callable[[str], Path | None]


@dataclass(frozen=True)
class Names:
    """Models that have a name. kind: what they are; bundled: name → folder; hub_ids: name → Hugging Face repository."""

    kind: str
    bundled: Mapping[str, Path]
    hub_ids: Mapping[str, str]


def finder(source: str | os.PathLike, names: Names, **hub: Any) -> Finder:
    """A function from a file name to its path in the source, or None where the source has no such file.

    source: a folder, a name, or a Hugging Face repository; the first of these that it can be. hub: revision, cache_dir
    and local_files_only, as in `hf_hub_download`. Raises CheckpointError here or at the first call.
    """
    name = os.fspath(source)
    folder = names.bundled.get(name, Path(name)) if not os.path.isdir(name) else Path(name)
    if folder.is_dir():
        return lambda file: folder / file if (folder / file).is_file() else None
    if name in names.hub_ids:
        name = names.hub_ids[name]
    elif os.path.isabs(name) or name.startswith(".") or name.endswith((".safetensors", ".json", *PICKLES)):
        raise CheckpointError(f"no such file or folder: {name}")
    elif name.count("/") != 1:
        unknown = zoo.unknown_name(names.kind, name, [*names.hub_ids, *names.bundled])
        raise CheckpointError(f"no such file or folder, nor a Hugging Face repository: {unknown}")

    def find(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, **hub))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and file == CONFIG:  # no connection, and never downloaded
                raise CheckpointError(f"{name}: not in the local cache, and not to be downloaded: {error}") from error
            return None
        except (OSError, ValueError) as error:  # no such repository or revision, no access, not a repository's name
            raise CheckpointError(f"{name} is no local folder, and as a Hugging Face repository: {error}") from error

    return find


def find_first(find: Finder, files: list[str], source: str | os.PathLike) -> Path:
    """The first of the files that the source has."""
    for path in map(find, files):
        if path is not None:
            return path
    raise CheckpointError(f"{os.fspath(source)}: no weights; looked for {', '.join(files)}")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: expected a JSON object with at least one entry")
    return content


def under_state_dict(content: Any) -> Any:
    """What a pickle holds under "state_dict", if it does, else all of it."""
    inner = content.get("state_dict") if isinstance(content, dict) else None
    return inner if isinstance(inner, dict) else content


def read_weights(path: Path, find: Finder, unwrap: Callable[[Any], Any] = under_state_dict) -> State:
    """A file's tensors by name; of shards, the ones that its index names, as `find` finds them.

    unwrap: from what a pickle holds to the state dict in it. Pickles may hold weights and plain values alone.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, find, unwrap)
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
        raise CheckpointError(f"{path}: not a readable file of weights alone: {_first_line(error)}") from error
    content = unwrap(content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a state dict")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise CheckpointError(
            f"{path}: no state dict where one is expected; no tensors at {_listed(others)} "
            f"of the keys {_listed(list(map(str, content)))}"
        )
    return content


def _read_shards(path: Path, find: Finder, unwrap: Callable[[Any], Any]) -> State:
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
        raise CheckpointError(f"{path}: expected a weight_map from names to files beside it")
    state = {}
    for shard in sorted(set(shards.values())):
        found = find(shard)
        if found is None:
            raise CheckpointError(f"{path}: the shard {shard} is missing")
        state |= read_weights(found, find, unwrap)
    return state


def check(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path) -> None:
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


def assemble(build: Callable[[], nn.Module], state: State) -> nn.Module:
    """The module that `build` makes with these tensors as they are, no copies, in evaluation mode."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(state, assign=True)
    return module.eval()


def write(folder: Path, state: Mapping[str, torch.Tensor], files: list[str], config: Mapping) -> None:
    """The weights as files[0], then config.json; files[1] is the index of older shards, which some would prefer."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_atomically(folder / files[0]) as path:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    (folder / files[1]).unlink(missing_ok=True)
    with written_atomically(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _first_line(error: Exception) -> str:
    """torch.load goes on to advise to load the file without its safeguards."""
    return str(error).partition("\n")[0].partition(" This file can still be loaded")[0]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
