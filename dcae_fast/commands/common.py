"""What the commands share: checks of options, and where and how to compute."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import dcae_fast

if TYPE_CHECKING:
    from dcae_fast.diffusion import DCAEDiffusion
    from dcae_fast.models.autoencoder import DCAE


class UsageError(ValueError):
    """A request that cannot be met; the message is all that is shown."""


def check_integer(option: str, value: int | None, least: int, most: int = 2**31 - 1) -> None:
    """UsageError unless least <= value <= most; None is an option that is not given."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{option} {value}: expected at {f'least {least}' if value < least else f'most {most}'}")


def check_workers(workers: int | None) -> None:
    check_integer("--workers", workers, least=0, most=4096)


def pixel_limit(max_pixels: int | None) -> int:
    """The most pixels of a picture, Pillow's limit by default. Raises UsageError."""
    from dcae_fast.images import MAX_PIXELS

    check_integer("--max-pixels", max_pixels, least=1)
    return max_pixels or MAX_PIXELS


def check_seed(option: str, seed: int) -> None:
    check_integer(option, seed, least=0, most=2**63 - 1)


def check_cfg(cfg: float) -> None:
    if not math.isfinite(cfg):
        raise UsageError(f"--cfg {cfg}: expected a finite number")


def make_folder(folder: Path, option: str = "--out") -> None:
    """Makes the folder that an option names; before the work, or its results would have no place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise UsageError(f"{option}: cannot make the folder {folder}: {reason}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option}: the folder {folder} is not writable")


def make_place(file: Path, option: str) -> None:
    """Makes the folder of the file that an option names."""
    if file.is_dir():
        raise UsageError(f"{option} {file}: is a folder; expected the name of a file")
    make_folder(file.parent, option)


UNITS = {"": 1, "B": 1} | {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", 1)}


def parse_bytes(option: str, text: str) -> int:
    """The bytes of a number with a unit: 4GiB, 500MB, 1e9. UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    units = {name.lower(): size for name, size in UNITS.items()}
    amount = float(match[1]) * units.get(match[2].lower(), math.nan) if match else math.nan
    if not 1 <= amount < 2**63:
        raise UsageError(f"{option} {text}: expected a size such as 4GiB, 500MB or a number of bytes")
    return int(amount)


@dataclass(frozen=True)
class Compute:
    """Where and how to compute."""

    device: str | None = None
    """a PyTorch device; by default CUDA if there is any, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """by default bfloat16 on CUDA, else float32"""
    patch: bool = True
    """use the fast operators"""
    max_memory: str | None = None
    """GPU memory that the autoencoder may use in a call, as 4GiB or 500MB; by default what is free. Less is slower"""

    def __post_init__(self):
        if self.max_bytes is not None and not self.patch:
            raise UsageError("--max-memory --no-patch: only the fast operators bound their memory")

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` of `dcae_fast.patch`."""
        return None if self.max_memory is None else parse_bytes("--max-memory", self.max_memory)

    def load_plain(self, model: str) -> "DCAE":
        from dcae_fast.reconstruction import load_model

        return load_model(model, self.device, self.dtype)

    def load(self, model: str) -> "DCAE":
        """An autoencoder, patched unless that is not wanted."""
        network = self.load_plain(model)
        if self.patch:
            dcae_fast.patch(network, max_memory=self.max_bytes)
        return network

    def load_diffusion(self, model: str) -> "DCAEDiffusion":
        from dcae_fast import sample

        return sample.load(model, self.device, self.dtype, self.patch, self.max_bytes)


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
