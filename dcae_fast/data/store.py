"""Storage of cached latents in .npy files or shards: finds valid latents, and adds new ones atomically."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dcae_fast.errors import DataError
from dcae_fast.files import save_npy, written_atomically

from .folders import list_files
from .latents import SHARDS, load_npy
from .manifest import Settings, Sums
from .pictures import Picture

READERS = 16


class NpyStore:
    """One .npy file per picture, at the picture's path, as in DC-Gen. bfloat16 is stored as float32.

    unit: one process writes `unit` consecutive latents. writers: number of threads that may write at once. changed:
    keys of changed pictures, whose existing latents are outdated.
    """

    unit, writers = 1, 8

    def __init__(self, folder: Path, pictures: list[Picture], settings: Settings):
        self.folder, self.pictures, self.shape = folder, pictures, settings.shape
        self.changed: set[str] = set()
        self.dtype = torch.float16 if settings.dtype == "float16" else torch.float32
        self._numpy = np.dtype(str(self.dtype).removeprefix("torch."))

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """All .npy files in a folder."""
        return [folder / name for name in list_files(folder).with_suffix(".npy")]

    def check_strays(self, removed: set[str]) -> None:
        """Removes the latents of removed pictures, given by key. Raises DataError for latents of unknown pictures."""
        known, removed = ({self._path(key) for key in keys} for keys in ({p.key for p in self.pictures}, removed))
        strays = [path for path in self.files(self.folder) if path not in known]
        _refuse(path for path in strays if path not in removed)
        for path in strays:
            path.unlink()

    def scan(self, indices: Iterable[int]) -> dict[int, Sums]:
        """The sums of the valid existing latents, by picture number. Removes invalid and outdated files."""
        with ThreadPoolExecutor(READERS) as pool:
            found = zip(indices, pool.map(self._sums, indices), strict=True)
            return {index: sums for index, sums in found if sums is not None}

    def _sums(self, index: int) -> Sums | None:
        path, latent = self._path(self.pictures[index].key), None
        if not path.exists():
            return None
        if self.pictures[index].key not in self.changed:
            with suppress(DataError):
                latent = load_npy(path)
        if latent is not None and latent.shape == self.shape and latent.dtype == self._numpy:
            sums = Sums.of(latent)
            if sums.finite:
                return sums
        path.unlink()
        return None

    def write(self, indices: list[int], latents: torch.Tensor) -> None:
        """Adds latents [n, c, h, w] on the CPU, in `dtype`."""
        for index, latent in zip(indices, latents.numpy(), strict=True):
            path = self._path(self.pictures[index].key)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_npy(path, latent)

    def close(self) -> None:
        """Called after the last write."""

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"


class ShardStore:
    """One safetensors file per `unit` consecutive pictures: "latents" [n, c, h, w], "classes" [n], metadata "names".

    Latents must arrive in order and from one thread: a shard is written when the first latent of the next shard
    arrives, or by `close`. unit, writers, changed: as in `NpyStore`.
    """

    unit, writers = 1024, 1

    def __init__(self, folder: Path, pictures: list[Picture], settings: Settings):
        self.folder, self.pictures, self.shape = folder, pictures, settings.shape
        self.changed: set[str] = set()
        self.dtype = getattr(torch, settings.dtype)
        self._pending: dict[int, torch.Tensor] = {}

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """All shards in a folder."""
        return sorted(folder.glob(SHARDS))

    def check_strays(self, removed: set[str]) -> None:
        """Removes shards beyond the pictures' number that contain only known and removed pictures.

        removed: the keys of removed pictures. Raises DataError for a shard that contains others.
        """
        expected = {self._path(first) for first in range(0, len(self.pictures), self.unit)}
        known = {picture.key for picture in self.pictures} | removed
        strays = [path for path in self.files(self.folder) if path not in expected]
        _refuse(path for path in strays if not known.issuperset(_names(path)))
        for path in strays:
            path.unlink()

    def scan(self, indices: Iterable[int]) -> dict[int, Sums]:
        """The sums of the valid existing latents, by picture number. Removes invalid and outdated latents."""
        found = {}
        for first in sorted({index // self.unit * self.unit for index in indices}):
            rows, count = self._load(first)
            found |= {index: Sums.of(latent.float().numpy()) for index, latent in rows.items()}
            if not rows:
                self._path(first).unlink(missing_ok=True)
            elif len(rows) < count:  # the others are outdated: their pictures were removed or changed
                self._pending = rows
                self.close()
        return found

    def write(self, indices: list[int], latents: torch.Tensor) -> None:
        """Adds latents [n, c, h, w] on the CPU, in `dtype`."""
        for index, latent in zip(indices, latents, strict=True):
            if self._pending and next(iter(self._pending)) // self.unit != index // self.unit:
                self.close()
            self._pending[index] = latent

    def close(self) -> None:
        """Writes the pending latents to their shard, with the valid latents that the shard already has."""
        if not self._pending:
            return
        first = next(iter(self._pending)) // self.unit * self.unit
        rows = self._load(first)[0] | self._pending
        indices = sorted(rows)
        tensors = {
            "latents": torch.stack([rows[index] for index in indices]),
            "classes": torch.tensor([self.pictures[index].label for index in indices]),
        }
        names = json.dumps([self.pictures[index].key for index in indices])
        with written_atomically(self._path(first)) as temporary:
            save_file(tensors, temporary, {"names": names})
        self._pending = {}

    def _load(self, first: int) -> tuple[dict[int, torch.Tensor], int]:
        """The valid latents of a shard by picture number, and the number of all latents in the file.

        Returns ({}, 0) if the file is damaged or absent.
        """
        try:
            with safe_open(self._path(first), framework="pt") as file:
                names = json.loads(file.metadata()["names"])
                latents, labels = file.get_tensor("latents"), file.get_tensor("classes").tolist()
            if latents.shape != (len(names), *self.shape) or latents.dtype != self.dtype:
                return {}, 0
            rows = {(name, label): latent for name, label, latent in zip(names, labels, latents, strict=True)}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            return {}, 0
        found = {}
        for index, picture in enumerate(self.pictures[first : first + self.unit], first):
            latent = rows.get((picture.key, picture.label))
            if latent is not None and picture.key not in self.changed and latent.isfinite().all():
                found[index] = latent
        return found, len(names)

    def _path(self, first: int) -> Path:
        return self.folder / SHARDS.replace("*", f"{first // self.unit:06d}")


def _names(path: Path) -> list[str]:
    """The keys of the pictures in a shard; a shard that cannot be read has the impossible key ""."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["names"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return [""]


def _refuse(strays: Iterable[Path]) -> None:
    for path in strays:
        raise DataError(
            f"{path}: latent of an unknown picture; choose another folder, or encode everything again with --overwrite"
        )


STORES = {"npy": NpyStore, "safetensors": ShardStore}
