"""captions.json of a folder of latents: the texts found beside the pictures, by key of the picture."""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from dcae_fast import distributed
from dcae_fast.errors import DataError
from dcae_fast.files import check_regular, written_atomically

from .pictures import Caption, Notes, Pictures

CAPTIONS = "captions.json"
READERS = 16

Captions = dict[str, str]  # key of a picture → its caption


class Found(NamedTuple):
    """captions: by key of the picture. unusable: (name, reason) of the files and members that contain none."""

    captions: Captions
    unusable: Notes


def read_captions(pictures: Pictures) -> Found:
    """Reads the captions of all pictures; the ranks share the work, and all return the same."""
    mine = [pictures.items[index] for index in distributed.share(len(pictures.items))]
    with ThreadPoolExecutor(READERS) as pool:
        parts = distributed.all_gather(list(pool.map(lambda each: _read(pictures, each.captions, each.shard), mine)))
    texts = [each for part in parts for each in part]
    found = Found({}, [])
    for picture, (text, unusable) in zip(pictures.items, texts, strict=True):
        if text is not None:
            found.captions[picture.key] = text
        found.unusable.extend(unusable)
    return found


def _read(pictures: Pictures, candidates: tuple[Caption, ...], shard: str) -> tuple[str | None, Notes]:
    """The first usable caption, and (name, reason) of the unusable ones before it."""
    unusable = []
    for each in candidates:
        try:
            path = pictures.root / (shard or each.name)
            check_regular(path)
            with open(path, "rb") as file:
                file.seek(each.offset)
                content = file.read(each.size if shard else -1).decode("utf-8-sig")
            return _text_of(each.name, content), unusable
        except (OSError, ValueError, RecursionError) as error:  # RecursionError: JSON with thousands of levels
            unusable.append((each.name, getattr(error, "strerror", None) or str(error)))
    return None, unusable


def _text_of(name: str, content: str) -> str:
    """The caption in the content of a .txt or .json file. Raises ValueError if there is none."""
    text = content
    if name.lower().endswith(".json"):
        values = json.loads(content)
        text = values.get("caption") if isinstance(values, Mapping) else None
        if not isinstance(text, str):
            raise ValueError('expected an object with a text "caption"')
    if not text.strip():
        raise ValueError("empty")
    text.encode()  # JSON may contain half a surrogate pair, which is no text and which tokenizers refuse
    return text.strip()


def load_captions(folder: str | os.PathLike) -> Captions:
    """Reads captions.json; empty if there is none. Raises DataError."""
    path = Path(folder) / CAPTIONS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}; run the same `dcae-fast cache-latents` again") from error
    if not isinstance(content, dict) or not all(isinstance(each, str) for each in content.values()):
        raise DataError(f"{path}: expected a text for each picture; run the same `dcae-fast cache-latents` again")
    return content


def save_captions(folder: Path, captions: Captions) -> None:
    """Writes captions.json; removes the file if there are no captions."""
    if not captions:
        (folder / CAPTIONS).unlink(missing_ok=True)
        return
    with written_atomically(folder / CAPTIONS) as temporary:
        temporary.write_text(json.dumps(captions) + "\n")
