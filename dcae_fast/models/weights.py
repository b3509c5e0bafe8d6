"""Read the files of checkpoints, check them against a model, and write them. `finder` finds the files."""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dcae_fast.errors import CheckpointError
from dcae_fast.files import written_atomically

from .finder import CONFIG, PICKLES, Finder

INDEX = ".index.json"
LISTED = 10  # names for one problem in an error, at most

State = dict[str, torch.Tensor]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not readable JSON: it is not UTF-8 text") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: not readable JSON: it is nested too deeply") from error
    except ValueError as error:  # its message has line and column
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: expected a JSON object with at least one entry")
    return content


def under_state_dict(content: Any) -> Any:
    """The dictionary under the key "state_dict" of a pickle, if there is one; else the whole content."""
    inner = content.get("state_dict") if isinstance(content, dict) else None
    return inner if isinstance(inner, dict) else content


def read_weights(path: Path, find: Finder, unwrap: Callable[[Any], Any] = under_state_dict) -> State:
    """The tensors of a weight file by name. For an index of shards, `find` finds the shards.

    Names lose what DistributedDataParallel ("module.") and torch.compile ("_orig_mod.") have added to them.
    unwrap: content of a pickle → the state dict in it. Pickles may contain only tensors and plain values.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path, find, unwrap)
    if path.suffix == ".safetensors":
        try:
            return _without_wrappers(load_file(path))
        except Exception as error:  # a broken or hostile file may raise anything
            raise CheckpointError(f"{path}: not a readable safetensors file: {_what_is_there(path, error)}") from error
    if path.suffix not in PICKLES:
        raise CheckpointError(f"{path}: unknown file type; expected .safetensors, {', '.join(PICKLES)}")
    content = unwrap(_read_pickle(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a state dict")
    others = [str(name) for name, value in content.items() if not (isinstance(name, str) and _is_plain(value))]
    if others:
        raise CheckpointError(
            f"{path}: expected a state dict, found no plain tensors at {_listed(others)} "
            f"of the keys {_listed(list(map(str, content)))}"
        )
    return _without_wrappers(content)


def _without_wrappers(state: State) -> State:
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _is_plain(value: Any) -> bool:
    """Whether this is a dense tensor with data: not on the meta device, not sparse, nested or quantised."""
    strange = not isinstance(value, torch.Tensor) or value.is_meta or value.is_nested or value.is_quantized
    return not strange and value.layout == torch.strided


def _read_pickle(path: Path) -> Any:
    """Read a file of torch.save that contains only tensors and plain values.

    PyTorch's own errors are not passed on, since they advise to load without safeguards.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about protocols and TorchScript, before an error of ours
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle may raise anything
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path}: a TorchScript program; expected the file of a state dict") from error
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name:
            raise CheckpointError(
                f"{path}: refused, since reading it would run code: it contains {name[1]}; expected only tensors and "
                "plain values. Ask for the weights as .safetensors"
            ) from error
        raise CheckpointError(f"{path}: not a readable file of weights: {_what_is_there(path, error)}") from error


def _what_is_there(path: Path, error: Exception) -> str:
    """A description of the file's content, for errors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; `git lfs pull` downloads the file"
    if start.lstrip().startswith(b"<"):
        return "it is a web page, perhaps an error page from the download"
    return f"its {path.stat().st_size} bytes are truncated, damaged or not weights; download the file again"


def _read_shards(path: Path, find: Finder, unwrap: Callable[[Any], Any]) -> State:
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(shard)).name != shard for shard in shards.values()):
        raise CheckpointError(f"{path}: expected a weight_map from names to files beside it")
    state = {}
    for shard in sorted(set(shards.values())):
        if not shard.endswith((".safetensors", *PICKLES)):  # an index, perhaps this one
            raise CheckpointError(f"{path}: names {shard!r} as a shard; expected .safetensors or {', '.join(PICKLES)}")
        found = find(shard)
        if found is None:
            raise CheckpointError(f"{path}: the shard {shard} is missing")
        state |= read_weights(found, find, unwrap)
    return state


def check(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise CheckpointError that lists tensors that are missing, unexpected, or have another shape or type."""
    missing = [name for name in expected if name not in state]
    unexpected = [str(name) for name in state if name not in expected]
    misfits = []
    for name, want in expected.items():
        have = state.get(name, want)
        if have.shape != want.shape:
            misfits.append(f"{name} {list(have.shape)} instead of {list(want.shape)}")
        elif not _can_become(have.dtype, want.dtype):
            misfits.append(f"{name} {have.dtype} instead of {want.dtype}")
    problems = {"missing": missing, "unexpected": unexpected, "unfit": misfits}
    found = [f"{len(names)} {problem}: {_listed(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointError("\n  ".join([f"{path} does not fit the model:", *found]))


def _can_become(have: torch.dtype, want: torch.dtype) -> bool:
    """Whether a tensor may be cast on loading.

    A real tensor may become an integer: a batch norm's counter that was cast along with the weights. Only floating
    point may become floating point: integers would be quantised weights without their scale.
    """
    return not have.is_complex and (have.is_floating_point or not want.is_floating_point)


def without_config(path: Path, models: str) -> CheckpointError:
    """The error for weights without a configuration. models: the models whose shapes the weights have."""
    advice = "put its config.json there, or pass config= in Python"
    return CheckpointError(f"{path}: no config.json beside it, and its shapes are those of {models}; {advice}")


def assemble(build: Callable[[], nn.Module], state: State, expected: State) -> nn.Module:
    """The module that `build` makes, with the tensors of `state` in the types of `expected`, in evaluation mode.

    A tensor that has that type is not copied. `check` must have found that the state fits.
    """
    with torch.device("meta"):
        module = build()
    module.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in expected.items()}, assign=True)
    return module.eval()


def write(folder: Path, state: Mapping[str, torch.Tensor], files: list[str], config: Mapping) -> None:
    """Write the weights as files[0], then config.json. Remove files[1], the index of old shards."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_atomically(folder / files[0]) as path:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    (folder / files[1]).unlink(missing_ok=True)
    with written_atomically(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
