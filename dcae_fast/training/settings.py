"""training.json: what a run's folder was begun with, and what must be the same when it goes on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcae_fast import distributed
from dcae_fast.data.latents import LatentDataset
from dcae_fast.files import written_atomically

from .config import Recipe, TrainingError

FILE = "training.json"
MAY_CHANGE = {"recipe.steps"}


def shards_of(folder: Path, recipe: Recipe, data: LatentDataset) -> int:
    """How many ranks the run in this folder began with, these ones if it begins now. Called by all ranks.

    TrainingError if the folder is that of another recipe or other data.
    """
    facts = json.loads(json.dumps({"items": len(data), "shape": data.shape, "recipe": asdict(recipe)}))
    result = distributed.broadcast(_settle(folder / FILE, facts) if distributed.is_main() else None)
    if isinstance(result, TrainingError):
        raise result
    return result


def _settle(file: Path, facts: dict[str, Any]) -> int | TrainingError:
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(file) as temporary:
            temporary.write_text(json.dumps(facts | {"shards": distributed.world_size()}, indent=2) + "\n")
        return distributed.world_size()
    try:
        there = json.loads(file.read_text())
        shards, before, now = there.pop("shards"), _flat(there), _flat(facts)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return TrainingError(f"{file}: not the settings of a training: {error!r}")
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(name) != now.get(name):
            return TrainingError(
                f"{file.parent} holds a training with {name.split('.')[-1]} {before.get(name)}, not {now.get(name)}; "
                "go on with the same, or take another folder"
            )
    return shards


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
