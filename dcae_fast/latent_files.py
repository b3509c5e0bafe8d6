"""Files of latents: written and read one by one, and read where `cache-latents` or the original wrote many."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .data.folders import list_files, suffix_of
from .data.latents import Shards, load_finite_npy
from .data.manifest import MANIFEST, DataError, Manifest, load_manifest
from .files import written_atomically

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class LatentError(ValueError):
    """A file that does not hold a latent that can be decoded; the message names it."""


@dataclass(frozen=True)
class Latent:
    """z: [1, c, h, w]; scaled: whether that is what `DCAE.encode` gives multiplied by the scaling factor.

    model: what to decode it with, and scaling_factor: the model's own; None where they are not known. size: (height,
    width) of the photograph, None for the whole picture; fit: how it was fitted ("crop", "pad").
    """

    z: torch.Tensor
    model: str | None
    scaling_factor: float | None
    size: tuple[int, int] | None
    fit: str
    scaled: bool = False

    def unscaled(self, scaling_factor: float | None) -> torch.Tensor:
        """z as `DCAE.encode` gives it. scaling_factor: the model's, for a latent that does not know its own.

        Raises LatentError if neither is known.
        """
        if not self.scaled:
            return self.z
        factor = self.scaling_factor or scaling_factor
        if factor is None:
            raise LatentError(f"no {MANIFEST} tells the scaling factor, and the model has none")
        return self.z.float() / factor

    def crop(self, picture: torch.Tensor) -> torch.Tensor:
        """The decoded picture [1, 3, H, W] without the padding."""
        return picture if self.size is None else picture[..., : self.size[0], : self.size[1]]


def save_latent(latent: Latent, path: Path) -> None:
    """A safetensors file of one tensor, "latent", and metadata; it appears whole or not at all. Not for scaled ones."""
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
    """The inverse of `save_latent`; raises LatentError."""
    try:
        with safe_open(path, framework="pt") as file:
            z, metadata = file.get_tensor("latent"), file.metadata() or {}
        if z.dtype not in DTYPES or z.ndim != 4 or len(z) != 1 or z.numel() == 0:
            dtype = str(z.dtype).removeprefix("torch.")
            raise ValueError(f"its latent is {dtype} {list(z.shape)}; expected floats [1, c, h, w]")
        if not z.isfinite().all():
            raise ValueError("NaN or infinity in the latent")
        return _with_metadata(z, metadata)
    except (OSError, SafetensorError) as error:
        raise LatentError(f"{path}: not a readable safetensors file: {error}") from error
    except KeyError as error:
        raise LatentError(f"{path}: not a latent written by dcae-fast encode: no {error} in its metadata") from error
    except ValueError as error:
        raise LatentError(f"{path}: not a latent written by dcae-fast encode: {error}") from error


def _with_metadata(z: torch.Tensor, metadata: dict[str, str]) -> Latent:
    """Raises KeyError or ValueError for metadata that `save_latent` does not write."""
    factor, size = metadata["scaling_factor"], (int(metadata["height"]), int(metadata["width"]))
    if min(size) < 1:
        raise ValueError(f"height {size[0]} and width {size[1]} in its metadata; expected at least 1")
    if metadata.get("scaled", "false") != "false":
        raise ValueError(f"scaled is {metadata['scaled']!r} in its metadata; expected 'false'")
    return Latent(z, metadata["model"], None if factor == "None" else float(factor), size, metadata["fit"])


def find_latents(path: Path) -> dict[Path, Callable[[], Latent]]:
    """Functions that load the latents of a file, or of a folder, by path; each raises LatentError or DataError.

    A folder is one of files that `save_latent` wrote, or one of `cache-latents` or the original, with the folders in
    it. The latents of a shard have its path and below it their names. Raises DataError for a folder without any.
    """
    manifest = cache(partial(_manifest_of, path))  # read where it is needed
    if not path.is_dir():
        return _in_file(path, manifest)
    names = list_files(path).with_suffix(".npy")
    names += sorted(child.name for child in path.iterdir() if suffix_of(child.name) == ".safetensors")
    if not names:
        raise DataError(f"{path}: nothing to read in this folder")
    return {latent: load for name in names for latent, load in _in_file(path / name, manifest).items()}


def _manifest_of(path: Path) -> Manifest | None:
    """The manifest of the cache that a path is in: in its folder or above."""
    for folder in (path.absolute(), *path.absolute().parents):
        manifest = load_manifest(folder)
        if manifest is not None:
            return manifest
    return None


def _in_file(path: Path, manifest: Callable[[], Manifest | None]) -> dict[Path, Callable[[], Latent]]:
    if suffix_of(path.name) == ".npy":
        return {path: lambda: _cached(load_finite_npy(path), manifest())}
    try:
        with safe_open(path, framework="pt") as file:
            is_shard = "latents" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError):
        is_shard = False  # `load_latent` will say why
    if not is_shard:
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


def _fail(error: DataError) -> Latent:
    raise error
