"""sources.json of a folder of latents: name, size and time of each latent's picture, to detect changed pictures."""

import json
from collections.abc import Container
from pathlib import Path

from dcae_fast.errors import DataError
from dcae_fast.files import written_atomically

from .pictures import Notes, Picture

SOURCES = "sources.json"

Sources = dict[str, list]  # key of a picture → its name, size in bytes, and modification time in ns


def sources_of(pictures: list[Picture]) -> Sources:
    return {picture.key: [picture.name, picture.size, picture.time] for picture in pictures}


def keys_of_removed(sources: Sources, failed: Notes, elsewhere: Container[str]) -> set[str]:
    """The keys of pictures in `sources` that failed, whose shard or folder failed, or whose name is in `elsewhere`."""
    names = {name.rstrip("/") for name, _ in failed}
    folders = tuple(f"{name}/" for name in names)
    removed = {key for key, (name, *_) in sources.items() if name in names or name.startswith(folders)}
    return removed | {key for key, (name, *_) in sources.items() if name in elsewhere}


def load_sources(folder: Path) -> Sources:
    """Reads sources.json; empty if there is none, as in folders of earlier versions. Raises DataError."""
    path = folder / SOURCES
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not all(map(_is_source, content.values())):
            raise ValueError("expected [name, size, time] for each picture")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; --overwrite encodes all pictures again") from error


def save_sources(folder: Path, sources: Sources) -> None:
    with written_atomically(folder / SOURCES) as temporary:
        temporary.write_text(json.dumps(sources) + "\n")


def _is_source(value: object) -> bool:
    return isinstance(value, list) and [type(each) for each in value] == [str, int, int]
