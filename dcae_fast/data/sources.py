"""sources.json of a folder of latents: what each latent was made from, so that a picture that changed is noticed."""

import json
from pathlib import Path

from dcae_fast.errors import DataError
from dcae_fast.files import written_atomically

from .pictures import Named, Picture

SOURCES = "sources.json"

Sources = dict[str, list]  # key of a picture → its name, size in bytes, and time of change in ns


def sources_of(pictures: list[Picture]) -> Sources:
    return {picture.key: [picture.name, picture.size, picture.time] for picture in pictures}


def keys_of_failed(sources: Sources, failed: Named) -> set[str]:
    """The keys of pictures that cannot be taken any more, whether they failed or the shard or folder that has them."""
    names = {name.rstrip("/") for name, _ in failed}
    folders = tuple(f"{name}/" for name in names)
    return {key for key, (name, *_) in sources.items() if name in names or name.startswith(folders)}


def load_sources(folder: Path) -> Sources:
    """Empty where there is no such file, as in folders of earlier versions. Raises DataError."""
    path = folder / SOURCES
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not all(map(_is_source, content.values())):
            raise ValueError("expected a name, a size and a time for each picture")
        return content
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable: {error}; --overwrite makes all latents anew") from error


def save_sources(folder: Path, sources: Sources) -> None:
    with written_atomically(folder / SOURCES) as temporary:
        temporary.write_text(json.dumps(sources) + "\n")


def _is_source(value: object) -> bool:
    return isinstance(value, list) and [type(each) for each in value] == [str, int, int]
