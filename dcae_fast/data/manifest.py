"""manifest.json of a folder of latents: settings of the encoding, number of latents, and statistics."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dcae_fast.errors import DataError
from dcae_fast.files import written_atomically

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Settings:
    """The settings that all latents of a folder share.

    model: as the user named it. dtype: of the computation. resolution: side of the square pictures. scaling_factor:
    the latents are multiplied by it. format: npy or safetensors. weights: `weights_hash` of the encoder. shape: of a
    latent, [c, h, w]. as_original: pictures are read as DC-Gen reads them (`pictures.to_rgb`), not by `images.as_seen`.
    precision: "exact", or for an encoder in 8 bit "int8" and the beginning of the hash of its scales.

    buckets: the latents have the shapes of the buckets of `buckets.bucket_sizes`, and are in a folder for each bucket;
    `shape` is the square's. The settings of such a bucket's folder have buckets=False, the bucket's shape, and the same
    resolution, whose square is near its pixels.
    """

    model: str
    dtype: str
    resolution: int
    scaling_factor: float
    format: str
    weights: str
    shape: tuple[int, int, int]
    as_original: bool = False
    precision: str = "exact"
    buckets: bool = False

    def check_same(self, other: "Settings", folder: Path) -> None:
        """Raises DataError unless all settings except `model` are equal: a model can have several names."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name != "model" and mine != theirs:
                raise DataError(
                    f"{folder} contains latents with {field.name} {theirs}, not {mine}; give the options of these "
                    "latents, choose another folder, or encode all pictures again with --overwrite"
                )


@dataclass(frozen=True)
class Manifest:
    """classes: class names by number, empty without classes. The other fields are None or empty until the run finishes.

    images: number of pictures. latents: number of latents. skipped: names of pictures and shards without a latent.
    mean, rms, std: of all scaled latents. ignored: names of files that are not pictures. captions: number of texts in
    captions.json. buckets: the names of the folders of the buckets that contain latents.
    """

    settings: Settings
    classes: tuple[str, ...]
    images: int | None = None
    latents: int | None = None
    skipped: tuple[str, ...] = ()
    mean: float | None = None
    rms: float | None = None
    std: float | None = None
    ignored: tuple[str, ...] = ()
    captions: int | None = None
    buckets: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        with written_atomically(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_manifest(folder: str | os.PathLike) -> Manifest | None:
    """The manifest of a folder; None if the folder has none. Raises DataError."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        content = {"ignored": [], "buckets": [], **json.loads(path.read_text())}
        absent = {"as_original": True, "precision": "exact", "buckets": False}  # in earlier versions
        settings = absent | content.pop("settings")
        for each, expected in ((settings, SETTINGS), (content, RESULTS)):
            _check(each, expected)
        lists = {name: tuple(content.pop(name)) for name in ("classes", "skipped", "ignored", "buckets")}
        return Manifest(Settings(**settings | {"shape": tuple(settings["shape"])}), **lists, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error if type(error) is ValueError else repr(error)
        raise DataError(f"{path}: not a manifest of cached latents: {reason}") from error


def _check(content: dict[str, Any], expected: dict[str, tuple[str, Callable[[Any], bool]]]) -> None:
    """Raises ValueError for an unknown name, or a value that does not satisfy the condition for its name."""
    for name in content.keys() - expected.keys():
        raise ValueError(f"{name} is unknown; a later version of dcae_fast may have written this manifest")
    for name, (words, holds) in expected.items():
        if not holds(content.get(name)):
            raise ValueError(f"{name} is {str(content.get(name))[:100]!r}; expected {words}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are(number: int | None, holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A condition: the value is a list of `number` values (None: any number) that all satisfy `holds`."""
    return lambda value: isinstance(value, list) and number in (None, len(value)) and all(map(holds, value))


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


TEXT, NAMES = ("text", _is_text), ("a list of names", _are(None, _is_text))
SETTINGS = dict.fromkeys(("model", "dtype", "weights"), TEXT)
SETTINGS |= dict.fromkeys(("as_original", "buckets"), ("true or false", lambda value: isinstance(value, bool)))
SETTINGS |= {
    "resolution": ("a positive integer", lambda value: _is_count(value) and value > 0),
    "scaling_factor": ("a positive number", lambda value: _is_number(value) and value > 0),
    "format": ("npy or safetensors", lambda value: value in ("npy", "safetensors")),
    "shape": ("three positive integers", _are(3, lambda value: _is_count(value) and value > 0)),
    "precision": ("exact or int8", lambda value: isinstance(value, str) and value.split()[:1] in (["exact"], ["int8"])),
}
RESULTS = dict.fromkeys(("classes", "skipped", "ignored", "buckets"), NAMES)
RESULTS |= dict.fromkeys(("images", "latents", "captions"), ("a count or null", _or_none(_is_count)))
RESULTS |= dict.fromkeys(("mean", "rms", "std"), ("a number or null", _or_none(_is_number)))


def weights_hash(module: nn.Module) -> str:
    """`tensors_hash` of the module's state dict."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of all names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Sums(NamedTuple):
    """Of one latent, in float64. count: elements; first: their sum; second: the sum of their squares."""

    count: int
    first: float
    second: float

    @classmethod
    def of(cls, latent: np.ndarray) -> "Sums":
        z = latent.astype(np.float64).ravel()
        with np.errstate(invalid="ignore"):  # the property `finite` reports it
            return cls(z.size, z.sum().item(), np.square(z).sum().item())

    @property
    def finite(self) -> bool:
        return math.isfinite(self.second)


def statistics(sums: Iterable[Sums]) -> dict[str, float]:
    """mean, rms = √(Σz² / n) and std = √((Σz² - mean Σz) / (n - 1)); empty for fewer than two elements.

    The latents' sums are added without rounding, so that the result does not depend on the order or number of ranks.
    """
    sums = list(sums)
    n = sum(each.count for each in sums)
    if n < 2:
        return {}
    first, second = (math.fsum(each[k] for each in sums) for k in (1, 2))
    mean = first / n
    return {"mean": mean, "rms": math.sqrt(second / n), "std": math.sqrt(max(second - mean * first, 0.0) / (n - 1))}
