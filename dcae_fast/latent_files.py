"""Latent files: written and read by `encode` and `decode`, and read from folders of `cache-latents` and DC-Gen."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .data.folders import list_files, suffix_of
from .data.latents import SHARDS, Shards, load_finite_npy
from .data.manifest import MANIFEST, Manifest, load_manifest
from .errors import DataError
from .files import check_regular, written_atomically

FITS = ("crop", "pad")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class LatentError(ValueError):
    """A file contains no latent that can be decoded. The message gives its path and the reason."""


@dataclass(frozen=True)
class Latent:
    """The latent of one picture.

    z: [1, c, h, w]. scaled: whether z is multiplied by the scaling factor. model: the model that encoded z, and
    scaling_factor: this model's scaling factor; None if unknown. size: (height, width) of the photograph; None means
    that the decoded picture has no padding. fit: how the photograph was fitted, "crop" or "pad".
    """

    z: torch.Tensor
    model: str | None
    scaling_factor: float | None
    size: tuple[int, int] | None
    fit: str
    scaled: bool = False

    def unscaled(self, scaling_factor: float | None) -> torch.Tensor:
        """z without the scaling factor, as `DCAE.encode` returns it.

        scaling_factor: the decoding model's, used if the latent's own is unknown. Raises LatentError if both are None.
        """
        if not self.scaled:
            return self.z
        factor = self.scaling_factor or scaling_factor
        if factor is None:
            raise LatentError(f"unknown scaling factor: found no {MANIFEST}, and the model has no scaling factor")
        return self.z.float() / factor

    def crop(self, picture: torch.Tensor) -> torch.Tensor:
        """Removes the padding from the decoded picture [1, 3, H, W]. Raises LatentError for a padded picture that is
        smaller than its photograph.
        """
        if self.fit == "pad" and (self.size[0] > picture.shape[2] or self.size[1] > picture.shape[3]):
            photograph, decoded = (f"{width}x{height}" for height, width in (self.size, picture.shape[2:]))
            raise LatentError(f"the photograph has {photograph} pixels in its metadata, the decoded picture {decoded}")
        return picture if self.size is None else picture[..., : self.size[0], : self.size[1]]


def save_latent(latent: Latent, path: Path) -> None:
    """Writes an unscaled latent atomically as a safetensors file with metadata and one tensor, "latent"."""
    metadata = {
        "model": latent.model,
        "scaling_factor": str(latent.scaling_factor),
        "scaled": "false",
        "height": str(latent.size[0]),
        "width": str(latent.size[1]),
        "fit": latent.fit,
    }
    with written_atomically(path) as temporary:
        save_file({"latent": latent.z.contiguous().cpu()}, temporary, metadata)


def load_latent(path: Path) -> Latent:
    """Reads a file of `save_latent`. Raises LatentError."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            z, metadata = file.get_tensor("latent"), file.metadata() or {}
        if z.dtype not in DTYPES or z.ndim != 4 or len(z) != 1 or z.numel() == 0:
            dtype = str(z.dtype).removeprefix("torch.")
            raise ValueError(f"the latent is {dtype} {list(z.shape)}; expected floats [1, c, h, w]")
        if not z.isfinite().all():
            raise ValueError("NaN or infinity in the latent")
        return _with_metadata(z, metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LatentError(f"{path}: not a readable safetensors file: {reason}") from error
    except KeyError as error:
        raise LatentError(f"{path}: not a latent written by dcae-fast encode: its metadata lacks {error}") from error
    except ValueError as error:
        raise LatentError(f"{path}: not a latent written by dcae-fast encode: {error}") from error


def _with_metadata(z: torch.Tensor, metadata: dict[str, str]) -> Latent:
    """The latent with its parsed metadata. Raises KeyError or ValueError for invalid metadata."""
    factor, height, width, fit = (metadata[name] for name in ("scaling_factor", "height", "width", "fit"))
    for name, value in {"height": height, "width": width}.items():
        if not re.fullmatch("0*[1-9][0-9]{0,8}", value):
            raise ValueError(f"{name} is {value!r} in its metadata; expected a number of pixels")
    if factor != "None" and not _is_positive(factor):
        raise ValueError(f"scaling_factor is {factor!r} in its metadata; expected a positive number")
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r} in its metadata; expected one of {FITS}")
    if metadata.get("scaled", "false") != "false":
        raise ValueError(f"scaled is {metadata['scaled']!r} in its metadata; expected 'false'")
    size = int(height), int(width)
    return Latent(z, metadata["model"], None if factor == "None" else float(factor), size, fit)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def find_latents(path: Path) -> dict[Path, Callable[[], Latent]]:
    """The latents of a file or folder: a loader for each latent's path. A loader raises LatentError or DataError.

    A folder contains files of `save_latent`, or is the output folder of `cache-latents` or DC-Gen, with subfolders. The
    path of a latent in a shard is the shard's path, "/" and the latent's name. Raises DataError for a folder without
    latents.
    """
    manifest = cache(partial(_manifest_of, path))  # read when it is first needed
    if not path.is_dir():
        return _loaders_of_file(path, manifest)
    names = list_files(path).with_suffix(".npy")
    names += sorted(child.name for child in path.iterdir() if suffix_of(child.name) == ".safetensors")
    names += sorted(shard.relative_to(path).as_posix() for shard in path.glob(f"*/{SHARDS}"))  # of the buckets
    if not names:
        raise DataError(f"{path}: expected latents in this folder, found no .npy or .safetensors file")
    return {latent: load for name in names for latent, load in _loaders_of_file(path / name, manifest).items()}


def _manifest_of(path: Path) -> Manifest | None:
    """The nearest manifest in the path's folder or the folders above; None if there is none."""
    for folder in (path.absolute(), *path.absolute().parents):
        manifest = load_manifest(folder)
        if manifest is not None:
            return manifest
    return None


def _loaders_of_file(path: Path, manifest: Callable[[], Manifest | None]) -> dict[Path, Callable[[], Latent]]:
    if suffix_of(path.name) == ".npy":
        return {path: lambda: _cached(load_finite_npy(path), manifest())}
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError):
        names = set()  # `load_latent` will raise the error
    if {"latents", "labels"} <= names:
        reason = "latents of `dcae-fast sample`, which draws them; expected latents of pictures"
        return {path: partial(_fail, LatentError(f"{path}: {reason}"))}
    if "latents" not in names:
        return {path: partial(load_latent, path)}
    try:
        shard = Shards([path])
    except DataError as error:
        return {path: partial(_fail, error)}
    return {shard.path(row): partial(_load_row, shard, row, manifest) for row in range(len(shard))}


def _load_row(shard: Shards, row: int, manifest: Callable[[], Manifest | None]) -> Latent:
    return _cached(shard[row][0], manifest())


def _cached(z: torch.Tensor, manifest: Manifest | None) -> Latent:
    model, factor = None, None
    if manifest is not None:
        model, factor = manifest.settings.model, manifest.settings.scaling_factor
    return Latent(z[None], model, factor, None, "crop", scaled=True)


def _fail(error: DataError | LatentError) -> Latent:
    raise error
