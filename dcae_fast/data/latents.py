"""Reads folders of latents written by `dcae-fast cache-latents`, or by DC-Gen as one .npy file per picture."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from dcae_fast.errors import DataError
from dcae_fast.files import check_regular

from .folders import list_files
from .manifest import MANIFEST, Manifest, load_manifest

SHARDS = "latents-*.safetensors"


class LatentDataset(Dataset):
    """Items (latent float32 [c, h, w], class number). Latents are multiplied by the scaling factor.

    Class folders are numbered in the order of their names; without class folders, every item has class 0. Items are
    sorted by class, then by name. classes: class names by number, empty without class folders. manifest: None for
    folders of DC-Gen. shape: [c, h, w]. The constructor and item access raise DataError for invalid files, including
    latents that are not finite or have another shape.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder; expected a folder of latents")
        self.manifest = load_manifest(self.folder)
        if self.manifest is not None and self.manifest.settings.buckets:
            buckets = ", ".join(self.manifest.buckets) or "none yet"
            raise DataError(
                f"{self.folder}: contains latents of several sizes, one folder for each ({buckets}); expected a folder "
                "with latents of one size"
            )
        self._read = open_latents(self.folder, self.manifest)
        if len(self._read) == 0:
            found = f"{SHARDS} without {MANIFEST}" if any(self.folder.glob(SHARDS)) else "no latents"
            raise DataError(f"{self.folder}: expected a folder written by `dcae-fast cache-latents`, found {found}")
        if self.manifest is not None and self.manifest.latents != len(self):
            listed = "is not finished" if self.manifest.latents is None else f"lists {self.manifest.latents}"
            raise DataError(
                f"{self.folder} contains {len(self)} latents, but its {MANIFEST} {listed}; "
                "run the same `dcae-fast cache-latents` command again until it finishes"
            )
        self.classes = self._read.classes
        self.shape = tuple(self[0][0].shape if self.manifest is None else self.manifest.settings.shape)

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} latents")
        return self._read[index]

    def key(self, index: int) -> str:
        """The path of the latent's picture, without suffix; `captions.load_captions` gives its caption by this key."""
        return self._read.key(index)


def open_latents(folder: Path, manifest: Manifest | None) -> "NpyTree | Shards":
    """The latents of a folder, whose manifest may be unfinished. Raises DataError."""
    classes, shape = (None, None) if manifest is None else (manifest.classes, manifest.settings.shape)
    if manifest is not None and manifest.settings.format == "safetensors":
        return Shards(sorted(folder.glob(SHARDS)), classes, shape)
    return NpyTree(folder, classes, shape)


class NpyTree:
    """One .npy file per latent, in class folders or flat. shape: expected of all latents; None means the first's."""

    def __init__(self, folder: Path, classes: tuple[str, ...] | None, shape: tuple[int, ...] | None):
        listing = list_files(folder)
        for name, reason in listing.failed:
            raise DataError(f"{folder / name}: {reason}")
        self.folder, self.names = folder, listing.with_suffix(".npy")
        if classes is None:
            classes = tuple(sorted({name.split("/")[0] for name in self.names if "/" in name}))
        self.classes, self._shape, self._is_from_manifest = classes, shape, shape is not None
        self._number = {name: number for number, name in enumerate(classes)}
        strays = [name for name in self.names if classes and name.split("/")[0] not in self._number]
        if strays:
            raise DataError(f"{folder / strays[0]}: not in a class folder; expected all latents in class folders")

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return self.folder / self.names[index]

    def key(self, index: int) -> str:
        return self.names[index].removesuffix(".npy")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        name, latent = self.names[index], load_finite_npy(self.path(index))
        if self._shape is None:
            self._shape = load_npy(self.path(0)).shape
        if latent.shape != self._shape:
            source = MANIFEST if self._is_from_manifest else self.names[0]
            expected = f"expected {list(self._shape)}, as in {source}"
            raise DataError(f"{self.path(index)}: latent of shape {list(latent.shape)}; {expected}")
        return latent, self._number[name.split("/")[0]] if self.classes else 0


class Shards:
    """Safetensors files with "latents" [n, c, h, w] and "classes" [n]. Each process opens a file only once.

    classes: class names by number. shape: of each latent. None means that classes or shape are not checked.
    """

    def __init__(self, paths: list[Path], classes: tuple[str, ...] | None = None, shape: tuple[int, ...] | None = None):
        self.paths, self.classes, self._shape = paths, classes, shape
        self._files: dict[int, tuple[Any, list[int], list[str] | None]] = {}
        self._ends = np.cumsum([len(self._open(number)[1]) for number in range(len(self.paths))])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.paths else 0

    def path(self, index: int) -> Path:
        """The path of a latent: its file, then the name of its picture or, without names, its row in the file."""
        return self.paths[self._place(index)[0]] / self.key(index)

    def key(self, index: int) -> str:
        """The name of a latent's picture or, without names, the latent's row in the file."""
        shard, row = self._place(index)
        names = self._open(shard)[2]
        return str(row) if names is None else names[row]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shard, row = self._place(index)
        latents, classes, _ = self._open(shard)
        latent = latents[row].float()
        check_latent(latent, self.path(index))
        return latent, classes[row]

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def _open(self, number: int) -> tuple[Any, list[int], list[str] | None]:
        """A shard's latents, class numbers, and picture names, if any."""
        if number not in self._files:
            path = self.paths[number]
            try:
                check_regular(path)
                file = safe_open(path, framework="pt")
                latents, classes = file.get_slice("latents"), file.get_tensor("classes").flatten().tolist()
                names = json.loads((file.metadata() or {}).get("names", "null"))
            except (OSError, SafetensorError, ValueError, RecursionError) as error:  # the last: JSON with many levels
                reason = getattr(error, "strerror", None) or error
                raise DataError(f"{path}: not a readable shard of latents: {reason}") from error
            self._check(path, latents.get_shape(), latents.get_dtype(), classes, names)
            self._files[number] = latents, classes, names
        return self._files[number]

    def _check(self, path: Path, shape: list[int], dtype: str, classes: list[int], names: Any) -> None:
        expected = [len(classes), *(shape[1:] if self._shape is None else self._shape)]
        if shape != expected or 0 in shape[1:] or dtype not in ("F64", "F32", "F16", "BF16"):
            raise DataError(f"{path}: latents are {dtype} {shape}; expected floats {expected}, no size 0")
        texts = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        if names is not None and (len(texts) != len(classes) or len(names) != len(classes)):
            raise DataError(f"{path}: expected {len(classes)} different names in its metadata, one per latent")
        most = math.inf if self.classes is None else max(1, len(self.classes))
        expected = "a whole number" if self.classes is None else f"0 to {most - 1}, as in {MANIFEST}"
        for row, label in enumerate(classes):
            if type(label) is not int or not 0 <= label < most:
                raise DataError(f"{path}: latent {row} has class {label}; expected {expected}")

    def __getstate__(self) -> dict:
        return vars(self) | {"_files": {}}  # open files are not passed to other processes


def check_latent(latent: torch.Tensor, path: Path) -> None:
    """Raises DataError, naming `path`, if the latent contains NaN or infinity."""
    if not latent.isfinite().all():
        raise DataError(f"{path}: contains NaN or infinity; encode the picture again, or remove this latent")


def load_npy(path: Path) -> np.ndarray:
    """Reads a latent [c, h, w]. Raises DataError if the file is missing, damaged, or contains something else."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            latent = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # for a broken header, numpy may raise any exception
        pickled = "allow_pickle" in str(error)
        reason = "contains pickled objects, not numbers" if pickled else getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: not a readable .npy file: {reason}") from error
    if latent.ndim != 3 or latent.dtype.kind != "f" or latent.size == 0:
        raise DataError(f"{path}: {latent.dtype} {list(latent.shape)}; expected floats [c, h, w]")
    return latent


def load_finite_npy(path: Path) -> torch.Tensor:
    """Reads a latent [c, h, w] as float32. Raises DataError as `load_npy`, and for values that are not finite."""
    with np.errstate(over="ignore"):  # `check_latent` reports infinity
        latent = torch.from_numpy(load_npy(path).astype(np.float32))
    check_latent(latent, path)
    return latent
