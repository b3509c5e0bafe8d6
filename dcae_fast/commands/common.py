"""What the commands share: errors in a request, where and how to compute, and options in files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from dcae_fast.errors import CheckpointError
from dcae_fast.models.diffusion_zoo import DIFFUSION_MODELS

if TYPE_CHECKING:
    from dcae_fast.diffusion import DCAEDiffusion
    from dcae_fast.models.autoencoder import DCAE


class UsageError(ValueError):
    """A request that cannot be met; the message is all that is shown."""


def check_workers(workers: int | None) -> None:
    if workers is not None and workers < 0:
        raise UsageError(f"--workers {workers}: expected at least 0")


def pixel_limit(max_pixels: int | None) -> int:
    """The most pixels of a picture, Pillow's limit by default. Raises UsageError."""
    from dcae_fast.images import MAX_PIXELS

    if max_pixels is not None and max_pixels < 1:
        raise UsageError(f"--max-pixels {max_pixels}: expected at least 1")
    return max_pixels or MAX_PIXELS


def make_folder(folder: Path) -> None:
    """For results; before the work, lest they have no place after it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder}: is not writable")


@dataclass(frozen=True)
class Compute:
    """Where and how to compute."""

    device: str | None = None
    """a PyTorch device; by default CUDA if there is any, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """by default bfloat16 on CUDA, else float32"""
    patch: bool = True
    """use the fast operators"""

    def load(self, model: str) -> "DCAE":
        from dcae_fast.reconstruction import load_model

        return load_model(model, self.device, self.dtype)

    def load_diffusion(self, model: str) -> "DCAEDiffusion":
        from dcae_fast import sample

        try:
            return sample.load(model, self.device, self.dtype, self.patch)
        except CheckpointError as error:
            if model in DIFFUSION_MODELS:
                raise UsageError(f"{error}\n{sample.how_to_get(model)}") from error
            raise


LISTED = 20  # unreadable pictures, in the terminal


def report_problems(failed: list[tuple[str, str]], missing: dict[str, str]) -> int:
    """Prints pictures (name, reason) that failed and why networks are missing; the exit status, 1 if there are any."""
    from dcae_fast import distributed

    for name, reason in failed[:LISTED]:
        distributed.print_main(f"failed: {name}: {reason}", error=True)
    if len(failed) > LISTED:
        distributed.print_main(f"... and {len(failed) - LISTED} more", error=True)
    for reason in missing.values():
        distributed.print_main(f"missing: {reason}", error=True)
    return 1 if failed or missing else 0


def with_files(arguments: Sequence[str]) -> list[str]:
    """The arguments, each @file.yaml, .toml or .json replaced by the options that it holds. UsageError.

    {"lr": 1e-4, "betas": [0.9, 0.99], "patch": false, "network": {"depth": 12}} is --lr 1e-4 --betas 0.9 0.99
    --no-patch --depth 12; the names of inner mappings only group options.
    """
    expanded = []
    for argument in arguments:
        expanded += _options(_read(Path(argument[1:]))) if argument.startswith("@") else [argument]
    return expanded


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".toml":
            import tomllib  # from Python 3.11 on

            content = tomllib.loads(path.read_text())
        elif path.suffix in (".yaml", ".yml", ".json"):  # which is YAML, too
            content = yaml.safe_load(path.read_text())
        else:
            raise UsageError(f"@{path}: expected a .yaml, .toml or .json file")
    except ImportError as error:
        raise UsageError(f"@{path}: reading TOML needs Python 3.11; YAML and JSON do not") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"@{path}: not readable: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"@{path}: expected options by name")
    return content


def _options(content: dict[str, Any]) -> list[str]:
    options = []
    for name, value in content.items():
        flag = str(name).replace("_", "-")
        if isinstance(value, dict):
            options += _options(value)
        elif isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            options += [f"--{flag}", *map(str, value)]
        else:
            options += [f"--{flag}", str(value)]
    return options
