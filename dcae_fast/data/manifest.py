"""manifest.json of a folder of latents: what they were made from and how, how many there are, and their statistics."""

import hashlib
import json
import math
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
    """What all latents of a folder share.

    model: as the user named it; dtype: computed in; resolution: sides of the pictures; scaling_factor: which the
    latents are multiplied by; format: npy or safetensors; weights: `weights_hash` of the encoder; shape: [c, h, w];
    as_original: pictures as they lie in their files, or else as a person sees them (`images.as_seen`).
    """

    model: str
    dtype: str
    resolution: int
    scaling_factor: float
    format: str
    weights: str
    shape: tuple[int, int, int]
    as_original: bool = False

    def check_same(self, other: "Settings", folder: Path) -> None:
        """DataError unless latents with the other settings may lie beside these. A model may have several names."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name != "model" and mine != theirs:
                raise DataError(
                    f"{folder} holds latents with {field.name} {theirs}, not {mine}; give the same options as for "
                    "these, take another folder, or make all anew with --overwrite"
                )


@dataclass(frozen=True)
class Manifest:
    """classes: their names by number, of pictures in class folders. The rest is None or empty until all is done.

    images: pictures found; latents: made of them; skipped: names of pictures and shards that none could be made of;
    mean, rms, std: of the scaled latents, all of them; ignored: names of files that are no pictures.
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

    def save(self, folder: Path) -> None:
        with written_atomically(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None if it has none. Raises DataError."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = {"ignored": [], **json.loads(path.read_text())}
        settings = {"as_original": True, **content.pop("settings")}  # earlier versions had no other way
        for each, expected in ((settings, SETTINGS), (content, RESULTS)):
            _check(each, expected)
        lists = {name: tuple(content.pop(name)) for name in ("classes", "skipped", "ignored")}
        return Manifest(Settings(**settings | {"shape": tuple(settings["shape"])}), **lists, **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = error if type(error) is ValueError else repr(error)
        raise DataError(f"{path}: not a manifest of cached latents: {told}") from error


def _check(content: dict[str, Any], expected: dict[str, tuple[str, Callable[[Any], bool]]]) -> None:
    """Raises ValueError for a value that is not what the manifest has under its name, and for other names."""
    for name in content.keys() - expected.keys():
        raise ValueError(f"{name} is not known; it may be of a later version")
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
    """Whether a value is a list, of so many values unless None, that are all of a kind."""
    return lambda value: isinstance(value, list) and number in (None, len(value)) and all(map(holds, value))


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


TEXT, NAMES = ("text", _is_text), ("a list of names", _are(None, _is_text))
SETTINGS = dict.fromkeys(("model", "dtype", "weights"), TEXT) | {
    "resolution": ("a positive integer", lambda value: _is_count(value) and value > 0),
    "scaling_factor": ("a positive number", lambda value: _is_number(value) and value > 0),
    "format": ("npy or safetensors", lambda value: value in ("npy", "safetensors")),
    "shape": ("three positive integers", _are(3, lambda value: _is_count(value) and value > 0)),
    "as_original": ("true or false", lambda value: isinstance(value, bool)),
}
RESULTS = dict.fromkeys(("classes", "skipped", "ignored"), NAMES)
RESULTS |= dict.fromkeys(("images", "latents"), ("a count or null", _or_none(_is_count)))
RESULTS |= dict.fromkeys(("mean", "rms", "std"), ("a number or null", _or_none(_is_number)))


def weights_hash(module: nn.Module) -> str:
    """`tensors_hash` of a state dict."""
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Sums(NamedTuple):
    """Of one latent, in fp64: its elements, their sum and the sum of their squares."""

    count: int
    first: float
    second: float

    @classmethod
    def of(cls, latent: np.ndarray) -> "Sums":
        z = latent.astype(np.float64).ravel()
        with np.errstate(invalid="ignore"):  # `finite` says it
            return cls(z.size, z.sum().item(), np.square(z).sum().item())

    @property
    def finite(self) -> bool:
        return math.isfinite(self.second)


def statistics(sums: Iterable[Sums]) -> dict[str, float]:
    """mean, rms = √(Σz² / n) and std = √((Σz² - mean Σz) / (n - 1)); empty unless there are two elements.

    The latents' sums are added exactly, so that no order or number of ranks changes a bit.
    """
    sums = list(sums)
    n = sum(each.count for each in sums)
    if n < 2:
        return {}
    first, second = (math.fsum(each[k] for each in sums) for k in (1, 2))
    mean = first / n
    return {"mean": mean, "rms": math.sqrt(second / n), "std": math.sqrt(max(second - mean * first, 0.0) / (n - 1))}
