"""Finding pictures: in class folders, in one folder, or in WebDataset's tar shards."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from dcae_fast.errors import DataError
from dcae_fast.images import picture_suffixes

from .folders import list_files, suffix_of
from .pictures import Picture, Pictures
from .shards import read_shards

LONGEST = 255  # bytes of a file's name, in most file systems


def find_pictures(source: Path, member: str | None = None) -> Pictures:
    """The pictures in a folder and below, in a folder of tar shards, or in one shard.

    The first folder on the way to a file names its class, numbered in the order of names; a folder of pictures alone
    has no classes. In shards see `read_shards`, and for `member`. Of pictures that would have the same latent none is
    taken. Raises DataError where there are no pictures, or where it is not clear what is meant.
    """
    if source.is_file() and suffix_of(source.name) == ".tar":
        pictures = read_shards(source.parent, [source.name], member)
    elif source.is_dir():
        listing = list_files(source)
        shards, loose = listing.with_suffix(".tar"), listing.with_suffix(*picture_suffixes())
        if shards and loose:
            raise DataError(f"{source / loose[0]}: beside shards; expected pictures in .tar files, or no such files")
        if member is not None and not shards:
            raise DataError(f"--member {member}: {source} has no .tar files")
        pictures = read_shards(source, shards, member) if shards else _in_folders(source, loose)
        taken = {*shards, *loose}
        pictures.ignored += listing.ignored
        pictures.ignored += [(name, "not a picture's suffix") for name in listing.files if name not in taken]
        pictures.failed += listing.failed
    else:
        raise DataError(f"{source}: no such folder, nor a .tar file")
    _sort(pictures)
    if not pictures.items:
        left = [f"{pictures.root / name}: {reason}" for name, reason in (pictures.failed + pictures.ignored)[:20]]
        raise DataError("\n".join([f"{source}: no pictures here that can be taken", *left]))
    return pictures


def _in_folders(root: Path, names: Sequence[str]) -> Pictures:
    classes = tuple(sorted({name.split("/")[0] for name in names if "/" in name}))
    numbers = {name: number for number, name in enumerate(classes)}
    strays = [name for name in names if classes and "/" not in name]
    if strays:
        raise DataError(f"{root / strays[0]}: beside class folders; expected pictures in folders, or no folders")
    pictures = Pictures(root, [], classes)
    for name in names:
        path, label = root / name, numbers.get(name.split("/")[0], 0)
        try:
            status = path.stat()
        except OSError as error:
            pictures.failed.append((name, error.strerror))
            continue
        if stat.S_ISREG(status.st_mode):
            key = name.rpartition(".")[0]
            pictures.items.append(Picture(name, key, label, size=status.st_size, time=status.st_mtime_ns))
        else:
            pictures.failed.append((name, "not a regular file"))
    return pictures


def _sort(pictures: Pictures) -> None:
    """Into the order of their latents' files, without those whose latents would have one name, or one too long."""
    groups: dict[str, list[Picture]] = {}
    for picture in sorted(pictures.items, key=lambda picture: f"{picture.key}.npy".split("/")):
        if max(len(os.fsencode(part)) for part in f"{picture.key}.npy".split("/")) > LONGEST:
            pictures.failed.append((picture.name, f"its latent would have a name of more than {LONGEST} bytes"))
        else:
            groups.setdefault(picture.key, []).append(picture)
    pictures.items = [group[0] for group in groups.values() if len(group) == 1]
    for key, group in groups.items():
        names = ", ".join(picture.name for picture in group)
        pictures.failed += [(p.name, f"{names} would all have the latent {key}") for p in group if len(group) > 1]
