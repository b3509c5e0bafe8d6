"""Finds pictures in class folders, in a flat folder, or in WebDataset tar shards."""

import os
import stat
from collections.abc import Container, Sequence
from pathlib import Path

from dcae_fast.errors import DataError
from dcae_fast.images import picture_suffixes

from .folders import list_files, suffix_of
from .pictures import CAPTION_SUFFIXES, Caption, Picture, Pictures
from .shards import read_shards

MAX_NAME_BYTES = 255  # of a file name, in most file systems


def find_pictures(source: Path, member: str | None = None) -> Pictures:
    """The pictures in a folder and its subfolders, in a folder of tar shards, or in one shard.

    A picture's class is the top-level subfolder; classes are numbered in the order of their names. A folder of
    pictures without subfolders has no classes. The caption of x.jpg is the text in x.txt, or else the text "caption" in
    x.json, as img2dataset writes them. For shards and `member`, see `read_shards`. Pictures whose latents would have
    the same path all fail. Raises DataError if there are no pictures, or if the files are ambiguous.
    """
    if source.is_file() and suffix_of(source.name) == ".tar":
        pictures = read_shards(source.parent, [source.name], member)
    elif source.is_dir():
        listing = list_files(source)
        shards, loose = listing.with_suffix(".tar"), listing.with_suffix(*picture_suffixes())
        if shards and loose:
            raise DataError(
                f"{source / loose[0]}: picture beside .tar shards; expected only pictures or only .tar shards"
            )
        if member is not None and not shards:
            raise DataError(f"--member {member}: expected .tar shards in {source}, found none")
        texts = set(listing.with_suffix(*CAPTION_SUFFIXES))
        pictures = read_shards(source, shards, member) if shards else _in_folders(source, loose, texts)
        taken = {*shards, *loose, *(each.name for picture in pictures.items for each in picture.captions)}
        pictures.ignored += listing.ignored
        pictures.ignored += [(name, "no picture suffix") for name in listing.files if name not in taken]
        pictures.failed += listing.failed
    else:
        raise DataError(f"{source}: expected a folder or a .tar file, found neither")
    _sort(pictures)
    if not pictures.items:
        reasons = [f"{pictures.root / name}: {reason}" for name, reason in (pictures.failed + pictures.ignored)[:20]]
        raise DataError("\n".join([f"{source}: found no usable pictures", *reasons]))
    return pictures


def _in_folders(root: Path, names: Sequence[str], texts: Container[str]) -> Pictures:
    """The pictures with these names. texts: the files that may contain captions."""
    classes = tuple(sorted({name.split("/")[0] for name in names if "/" in name}))
    numbers = {name: number for number, name in enumerate(classes)}
    strays = [name for name in names if classes and "/" not in name]
    if strays:
        raise DataError(f"{root / strays[0]}: picture beside class folders; expected all pictures in folders, or none")
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
            captions = tuple(Caption(f"{key}{suffix}") for suffix in CAPTION_SUFFIXES if f"{key}{suffix}" in texts)
            picture = Picture(name, key, label, size=status.st_size, time=status.st_mtime_ns, captions=captions)
            pictures.items.append(picture)
        else:
            pictures.failed.append((name, "not a regular file"))
    return pictures


def _sort(pictures: Pictures) -> None:
    """Sorts pictures by the path of their latents. Pictures with duplicate or too long latent names become failed."""
    groups: dict[str, list[Picture]] = {}
    for picture in sorted(pictures.items, key=lambda picture: f"{picture.key}.npy".split("/")):
        if max(len(os.fsencode(part)) for part in f"{picture.key}.npy".split("/")) > MAX_NAME_BYTES:
            pictures.failed.append((picture.name, f"the file name of its latent would exceed {MAX_NAME_BYTES} bytes"))
        else:
            groups.setdefault(picture.key, []).append(picture)
    pictures.items = [group[0] for group in groups.values() if len(group) == 1]
    for key, group in groups.items():
        names = ", ".join(picture.name for picture in group)
        pictures.failed += [
            (p.name, f"{names} would share the latent {key}; expected unique names") for p in group if len(group) > 1
        ]
