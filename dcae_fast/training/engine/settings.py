"""training.json: the recipe and the facts about the data that a run began with, compared when the run is resumed.

A value that is absent counts as None. So a run resumes with a later version that has more options, if None is their
default.
"""

import json
import re
from pathlib import Path
from typing import Any

from dcae_fast import distributed
from dcae_fast.files import written_atomically
from dcae_fast.lock import is_unused

from .config import TrainingError

FILE = "training.json"
MAY_CHANGE = {"recipe.steps"}


def shards_of(folder: Path, settings: dict[str, Any], has_begun: bool) -> int:
    """The number of ranks that the run in this folder began with; the present one if it begins now.

    settings: values for JSON, by name, may be nested. has_begun: whether the run has a checkpoint to resume from.
    Called by all ranks. Raises TrainingError if the folder contains a run with other settings, or something else.
    """
    settings = json.loads(json.dumps(settings))
    return distributed.on_main(lambda: _settle(folder / FILE, settings, has_begun))


def _settle(file: Path, settings: dict[str, Any], has_begun: bool) -> int:
    if not file.is_file():
        if not is_unused(file.parent):
            raise TrainingError(f"{file.parent} is not empty and has no {FILE}; choose another folder")
        return _begin(file, settings)
    try:
        there = json.loads(file.read_text())
        shards, before, now = int(there.pop("shards")), _flat(there), _flat(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file}: cut short, damaged, or not the settings of a training") from error
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(name) != now.get(name):
            if not has_begun:  # the former attempt failed before its first checkpoint
                return _begin(file, settings)
            raise TrainingError(f"{file.parent} contains a training with {_differ(name, before, now)}")
    return shards


def _differ(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """How a value differs, and what to do. A hash says nothing to a reader."""
    last, values = name.rpartition(".")[2], (before.get(name), now.get(name))
    if all(re.fullmatch("[0-9a-f]{64}", str(value)) for value in values):
        return f"other {last.replace('_', ' ')}; resume it with the same data, or choose another folder"
    return f"{last} {values[0]}, not {values[1]}; resume it with the same value, or choose another folder"


def _begin(file: Path, settings: dict[str, Any]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(file) as temporary:
        temporary.write_text(json.dumps(settings | {"shards": distributed.world_size()}, indent=2) + "\n")
    return distributed.world_size()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
