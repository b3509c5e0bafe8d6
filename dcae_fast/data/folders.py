"""Lists the files in a folder and its subfolders."""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Listing:
    """Paths relative to a folder, with "/" as separator, sorted part by part.

    files: files that are neither hidden nor in hidden folders. ignored: (path, reason) of all others. failed: (path,
    reason) of folders that cannot be listed.
    """

    files: list[str] = field(default_factory=list)
    ignored: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    def with_suffix(self, *suffixes: str) -> list[str]:
        """The files with one of the suffixes, which must be lower case."""
        return [name for name in self.files if suffix_of(name) in suffixes]


def suffix_of(name: str) -> str:
    """The suffix in lower case, with its dot; "" for none."""
    return os.path.splitext(name)[1].lower()


def list_files(folder: Path) -> Listing:
    """Lists the files in a folder and its subfolders, and follows links.

    Every folder is listed once, under its real path if this is below `folder`. Links to folders above are ignored.
    """
    listing, seen = Listing(), {_identity(each) for each in folder.resolve().parents}
    folders, links = [""], deque()
    while folders or links:
        path = folders.pop() if folders else links.popleft()
        try:
            identity = _identity(folder / path)
            if identity in seen:
                listing.ignored.append((f"{path}/", "leads to a folder that is listed already, or to a folder above"))
                continue
            seen.add(identity)
            with os.scandir(folder / path) as entries:
                _sort_entries(entries, f"{path}/" if path else "", listing, folders, links)
        except OSError as error:
            listing.failed.append((f"{path}/", error.strerror or str(error)))
    for names in (listing.files, listing.ignored):
        names.sort(key=lambda name: (name if isinstance(name, str) else name[0]).split("/"))
    return listing


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _sort_entries(entries, prefix: str, listing: Listing, folders: list[str], links: deque[str]) -> None:
    for entry in sorted(entries, key=lambda entry: entry.name):
        name, is_folder = f"{prefix}{entry.name}", _is_folder(entry)
        if entry.name.startswith("."):
            listing.ignored.append((f"{name}/" if is_folder else name, "hidden"))
        elif not is_folder:
            listing.files.append(name)
        elif entry.is_symlink():
            links.append(name)
        else:
            folders.append(name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
