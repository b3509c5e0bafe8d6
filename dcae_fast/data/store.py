"""Where cached latents lie: which of them are there and valid, and how more are added, each file whole or absent."""

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
    """One .npy file per picture under its own path, as the original has them; bfloat16 is stored as float32.

    unit: so many consecutive latents are written by one process; writers: threads that may write at once; changed: keys
    of pictures whose latents, if there are any, are of what they were before.
    """

    unit, writers = 1, 8

    def __init__(self, folder: Path, pictures: list[Picture], settings: Settings):
        self.folder, self.pictures, self.shape = folder, pictures, settings.shape
        self.changed: set[str] = set()
        self.dtype = torch.float16 if settings.dtype == "float16" else torch.float32
        self._numpy = np.dtype(str(self.dtype).removeprefix("torch."))

    @staticmethod
    def files(folder: Path) -> list[Path]:
        """All latents in a folder."""
        return [folder / name for name in list_files(folder).with_suffix(".npy")]

    def check_strays(self, failed: set[str]) -> None:
        """Removes the latents of failed pictures, given by key; DataError if another picture has a latent here."""
        known, removed = ({self._path(key) for key in keys} for keys in ({p.key for p in self.pictures}, failed))
        strays = [path for path in self.files(self.folder) if path not in known]
        _refuse(path for path in strays if path not in removed)
        for path in strays:
            path.unlink()

    def scan(self, indices: Iterable[int]) -> dict[int, Sums]:
        """The sums of those latents that are there and valid, by number; files that are not valid are removed."""
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
        """Adds latents [n, c, h, w], of `dtype` and on the CPU."""
        for index, latent in zip(indices, latents.numpy(), strict=True):
            path = self._path(self.pictures[index].key)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_npy(path, latent)

    def close(self) -> None:
        """After the last write."""

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npy"


class ShardStore:
    """Files of `unit` consecutive pictures: "latents" [n, c, h, w], "classes" [n], and the names in the metadata.

    A shard is written when a latent of another one comes, or at the end: latents come in order, from one thread.
    changed: as in `NpyStore`.
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

    def check_strays(self, failed: set[str]) -> None:
        """DataError if there is a shard beyond those that the pictures fill."""
        expected = {self._path(first) for first in range(0, len(self.pictures), self.unit)}
        _refuse(path for path in self.files(self.folder) if path not in expected)

    def scan(self, indices: Iterable[int]) -> dict[int, Sums]:
        """The sums of those latents that are there and valid, by number; the others are removed."""
        found = {}
        for first in sorted({index // self.unit * self.unit for index in indices}):
            rows, count = self._load(first)
            found |= {index: Sums.of(latent.float().numpy()) for index, latent in rows.items()}
            if not rows:
                self._path(first).unlink(missing_ok=True)
            elif len(rows) < count:  # others are of pictures that are gone or changed
                self._pending = rows
                self.close()
        return found

    def write(self, indices: list[int], latents: torch.Tensor) -> None:
        """Adds latents [n, c, h, w], of `dtype` and on the CPU."""
        for index, latent in zip(indices, latents, strict=True):
            if self._pending and next(iter(self._pending)) // self.unit != index // self.unit:
                self.close()
            self._pending[index] = latent

    def close(self) -> None:
        """Writes the shard that is begun, with what its file already had."""
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
        """The valid latents of a shard by number, and how many there are with those of no picture; none if the file is
        torn or absent.
        """
        try:
            with safe_open(self._path(first), framework="pt") as file:
                names = json.loads(file.metadata()["names"])
                latents, labels = file.get_tensor("latents"), file.get_tensor("classes").tolist()
            if latents.shape != (len(names), *self.shape) or latents.dtype != self.dtype:
                return {}, 0
            rows = {(name, label): latent for name, label, latent in zip(names, labels, latents, strict=True)}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return {}, 0
        found = {}
        for index, picture in enumerate(self.pictures[first : first + self.unit], first):
            latent = rows.get((picture.key, picture.label))
            if latent is not None and picture.key not in self.changed and latent.isfinite().all():
                found[index] = latent
        return found, len(names)

    def _path(self, first: int) -> Path:
        return self.folder / SHARDS.replace("*", f"{first // self.unit:06d}")


def _refuse(strays: Iterable[Path]) -> None:
    for path in strays:
        raise DataError(f"{path}: of none of the pictures; take another folder, or make all anew with --overwrite")


STORES = {"npy": NpyStore, "safetensors": ShardStore}
