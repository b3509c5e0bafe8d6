"""Folders of latents, written by `dcae-fast cache-latents` or, one .npy file per picture, by the original."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from .manifest import DataError, Manifest, load_manifest

SHARDS = "latents-*.safetensors"


class LatentDataset(Dataset):
    """Items (latent float32 [c, h, w], class number); latents are already multiplied by the scaling factor.

    Class folders are numbered in the order of their names, and a folder without any has class 0 alone; items are
    sorted by class, then by name. classes: names by number, empty if flat; manifest: None for the original's folders;
    shape: [c, h, w]. Raises DataError, here or where an item is read.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder")
        self.manifest = load_manifest(self.folder)
        self._read = _open(self.folder, self.manifest)
        if len(self._read) == 0:
            raise DataError(f"{self.folder}: no latents here; `dcae-fast cache-latents` makes them")
        if self.manifest is not None and self.manifest.latents != len(self):
            told = "an end" if self.manifest.latents is None else f"{self.manifest.latents} of them"
            raise DataError(
                f"{self.folder}: {len(self)} latents, but manifest.json does not tell of {told}; "
                "run the same `dcae-fast cache-latents` to its end"
            )
        self.classes = self._read.classes
        self.shape = tuple(self[0][0].shape)

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} latents")
        return self._read[index]


def _open(folder: Path, manifest: Manifest | None) -> "NpyTree | Shards":
    classes = None if manifest is None else manifest.classes
    if manifest is not None and manifest.settings.format == "safetensors":
        return Shards(folder, classes)
    return NpyTree(folder, classes)


class NpyTree:
    """One .npy file per latent, in class folders or flat."""

    def __init__(self, folder: Path, classes: tuple[str, ...] | None):
        self.folder = folder
        self.names = sorted(files_under(folder, {".npy"}), key=lambda name: name.split("/"))
        if classes is None:
            classes = tuple(sorted({name.split("/")[0] for name in self.names if "/" in name}))
        self.classes = classes
        self._number = {name: number for number, name in enumerate(classes)}
        strays = [name for name in self.names if classes and name.split("/")[0] not in self._number]
        if strays:
            raise DataError(f"{folder / strays[0]}: in none of the class folders")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        name = self.names[index]
        latent = load_npy(self.folder / name)
        return torch.from_numpy(latent.astype(np.float32)), self._number[name.split("/")[0]] if self.classes else 0


class Shards:
    """Files of "latents" [n, c, h, w] and "classes" [n]; each is opened once in each process and then stays so."""

    def __init__(self, folder: Path, classes: tuple[str, ...]):
        self.classes = classes
        self.paths = sorted(folder.glob(SHARDS))
        self._files: dict[int, tuple[Any, torch.Tensor]] = {}
        self._ends = np.cumsum([len(self._open(number)[1]) for number in range(len(self.paths))])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.paths else 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        latents, classes = self._open(shard)
        row = index - (int(self._ends[shard - 1]) if shard else 0)
        return latents[row].float(), int(classes[row])

    def _open(self, number: int) -> tuple[Any, torch.Tensor]:
        if number not in self._files:
            path = self.paths[number]
            try:
                file = safe_open(path, framework="pt")
                self._files[number] = file.get_slice("latents"), file.get_tensor("classes")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: not a shard of latents: {error}") from error
        return self._files[number]

    def __getstate__(self) -> dict:
        return vars(self) | {"_files": {}}  # open files stay in their process


def load_npy(path: Path) -> np.ndarray:
    """A latent [c, h, w]; raises DataError for a file that is missing, torn or holds something else."""
    try:
        latent = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable .npy file: {error}") from error
    if latent.ndim != 3 or latent.dtype.kind != "f":
        raise DataError(f"{path}: {latent.dtype} {list(latent.shape)}; expected floats [c, h, w]")
    return latent


def files_under(folder: Path, suffixes: set[str]) -> Iterator[str]:
    """The files below a folder with one of the suffixes (lower case), as paths from it with "/"; no hidden ones."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(parent).relative_to(folder).as_posix()
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield name if prefix == "." else f"{prefix}/{name}"
