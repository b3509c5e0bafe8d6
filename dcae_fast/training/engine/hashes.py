"""hashes.json: the SHA-256 of each file in a folder, to detect files that were cut short or whose bits have changed."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dcae_fast import distributed
from dcae_fast.files import writing

FILE = "hashes.json"
THREADS = 8
BLOCK = 1 << 20


def save_hashes(folder: Path) -> None:
    """Writes hashes.json for all files in the folder. Called by all ranks. Raises WriteError."""
    names = distributed.on_main(
        lambda: sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    )
    hashes = _hashes(folder, names)
    distributed.on_main(lambda: _write(folder / FILE, hashes))


def find_damage(folder: Path) -> str | None:
    """Says which file of the folder differs from hashes.json; None if no file differs, or if there is no hashes.json.

    Called by all ranks.
    """
    expected = distributed.on_main(lambda: _read(folder / FILE))
    if not isinstance(expected, dict):
        return expected
    found = _hashes(folder, list(expected))
    absent = [name for name in expected if found[name] is None]
    changed = [name for name in expected if found[name] != expected[name]]
    if absent:
        return f"{absent[0]} is absent or unreadable"
    return f"{changed[0]} has changed since it was written" if changed else None


def _write(file: Path, hashes: dict[str, str | None]) -> None:
    with writing(file):
        file.write_text(json.dumps(hashes, indent=2) + "\n")


def _read(file: Path) -> dict[str, str] | str | None:
    """The hashes in the file; a complaint if it is unreadable; None if it does not exist."""
    if not file.exists():
        return None
    try:
        hashes = json.loads(file.read_bytes())
    except (OSError, ValueError):
        hashes = None
    return hashes if isinstance(hashes, dict) and hashes else f"{FILE} is unreadable"


def _hashes(folder: Path, names: list[str]) -> dict[str, str | None]:
    """The hash of each of these files, None where the file cannot be read. Each rank reads its share of the files."""
    mine = names[distributed.rank() :: distributed.world_size()]
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(mine, pool.map(_hash, [folder / name for name in mine]), strict=True))
    return {name: value for part in distributed.all_gather(hashes) for name, value in part.items()}


def _hash(file: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as content:
            while block := content.read(BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
