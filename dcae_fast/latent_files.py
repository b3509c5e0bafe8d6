"""Latent files: written and read by `encode` and `decode`, and read from folders of `cache-latents` and DC-Gen."""

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
from .files import written_atomically

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
        """Removes the padding from the decoded picture [1, 3, H, W]."""
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
        with safe_open(path, framework="pt") as file:
            z, metadata = file.get_tensor("latent"), file.metadata() or {}
        if z.dtype not in DTYPES or z.ndim != 4 or len(z) != 1 or z.numel() == 0:
            dtype = str(z.dtype).removeprefix("torch.")
            raise ValueError(f"the latent is {dtype} {list(z.shape)}; expected floats [1, c, h, w]")
        if not z.isfinite().all():
            raise ValueError("NaN or infinity in the latent")
        return _with_metadata(z, metadata)
    except (OSError, SafetensorError) as error:
        raise LatentError(f"{path}: not a readable safetensors file: {error}") from error
    except KeyError as error:
        raise LatentError(f"{path}: not a latent written by dcae-fast encode: its metadata lacks {error}") from error
    except ValueError as error:
        raise LatentError(f"{path}: not a latent written by dcae-fast encode: {error}") from error


def _with_metadata(z: torch.Tensor, metadata: dict[str, str]) -> Latent:
    """The latent with its parsed metadata. Raises KeyError or ValueError for invalid metadata."""
    factor, size = metadata["scaling_factor"], (int(metadata["height"]), int(metadata["width"]))
    if min(size) < 1:
        raise ValueError(f"height {size[0]} and width {size[1]} in its metadata; expected at least 1")
    if metadata.get("scaled", "false") != "false":
        raise ValueError(f"scaled is {metadata['scaled']!r} in its metadata; expected 'false'")
    return Latent(z, metadata["model"], None if factor == "None" else float(factor), size, metadata["fit"])


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
        with safe_open(path, framework="pt") as file:
            is_shard = "latents" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError):
        is_shard = False  # `load_latent` will raise the error
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
