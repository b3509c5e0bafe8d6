"""training.json: what a run was begun with, and what must be the same when it is resumed."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcae_fast import distributed
from dcae_fast.data.latents import LatentDataset
from dcae_fast.files import written_atomically
from dcae_fast.lock import is_unused

from .config import Recipe, TrainingError

FILE = "training.json"
MAY_CHANGE = {"recipe.steps"}


def shards_of(folder: Path, recipe: Recipe, data: LatentDataset, has_begun: bool) -> int:
    """How many ranks the run in this folder began with, these ones if it begins now. Called by all ranks.

    has_begun: whether there is a checkpoint to resume from. TrainingError if the folder belongs to another recipe,
    other data, or something else.
    """
    facts = json.loads(json.dumps(facts_of(data) | {"recipe": asdict(recipe)}))
    return distributed.on_main(lambda: _settle(folder / FILE, facts, has_begun))


def facts_of(data: LatentDataset) -> dict[str, Any]:
    """Facts by which the same latents are recognised."""
    names = hashlib.sha256("\n".join(data.classes).encode()).hexdigest()
    settings = None if data.manifest is None else data.manifest.settings
    made = {} if settings is None else {"scaling_factor": settings.scaling_factor, "weights": settings.weights}
    return {"items": len(data), "shape": data.shape, "classes": names} | made


def _settle(file: Path, facts: dict[str, Any], has_begun: bool) -> int:
    if not file.is_file():
        if not is_unused(file.parent):
            raise TrainingError(f"{file.parent} is not empty and has no {FILE}; take another folder")
        return _begin(file, facts)
    try:
        there = json.loads(file.read_text())
        shards, before, now = int(there.pop("shards")), _flat(there), _flat(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file}: cut short, damaged, or not the settings of a training") from error
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(name) != now.get(name):
            if not has_begun:  # another attempt
                return _begin(file, facts)
            raise TrainingError(
                f"{file.parent} holds a training with {name.split('.')[-1]} {before.get(name)}, not {now.get(name)}; "
                "go on with the same, or take another folder"
            )
    return shards


def _begin(file: Path, facts: dict[str, Any]) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(file) as temporary:
        temporary.write_text(json.dumps(facts | {"shards": distributed.world_size()}, indent=2) + "\n")
    return distributed.world_size()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
