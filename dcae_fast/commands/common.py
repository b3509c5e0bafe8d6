"""Shared by the commands: checks of options, the compute options, and the report of failed pictures."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dcae_fast

if TYPE_CHECKING:
    from dcae_fast.diffusion import DCAEDiffusion
    from dcae_fast.models.autoencoder import DCAE


Sampler = Literal["DPM_Solver", "ODE_dopri5", "ODE_heun2", "SDE", "GaussianDiffusion"]


class UsageError(ValueError):
    """A request that cannot be met. The command line prints only the message."""


def check_integer(option: str, value: int | None, least: int, most: int = 2**31 - 1) -> None:
    """Raises UsageError unless least <= value <= most or value is None (the option is not given)."""
    if value is not None and not least <= value <= most:
        raise UsageError(f"{option} {value}: expected at {f'least {least}' if value < least else f'most {most}'}")


def check_workers(workers: int | None) -> None:
    check_integer("--workers", workers, least=0, most=4096)


def pixel_limit(max_pixels: int | None) -> int:
    """The maximum number of pixels in a picture: `max_pixels`, or Pillow's limit for None. Raises UsageError."""
    from dcae_fast.images import MAX_PIXELS

    check_integer("--max-pixels", max_pixels, least=1)
    return max_pixels or MAX_PIXELS


def check_seed(option: str, seed: int) -> None:
    check_integer(option, seed, least=0, most=2**63 - 1)


def check_cfg(cfg: float) -> None:
    if not math.isfinite(cfg):
        raise UsageError(f"--cfg {cfg}: expected a finite number")


def make_folder(folder: Path, option: str = "--out") -> None:
    """Makes the output folder that `option` names. Called before the work, whose results would otherwise be lost.

    Raises UsageError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise UsageError(f"{option}: cannot create the folder {folder}: {reason}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option}: no permission to write to the folder {folder}")


def make_parent_folder(file: Path, option: str) -> None:
    """Makes the folder of the output file that `option` names. Raises UsageError."""
    if file.is_dir():
        raise UsageError(f"{option} {file}: is a folder; expected a file name")
    make_folder(file.parent, option)


UNITS = {"": 1, "B": 1} | {f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGT", 1)}


def parse_bytes(option: str, text: str) -> int:
    """The number of bytes in a size with a unit: 4GiB, 500MB, 1e9. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    units = {name.lower(): size for name, size in UNITS.items()}
    amount = float(match[1]) * units.get(match[2].lower(), math.nan) if match else math.nan
    if not 1 <= amount < 2**63:
        raise UsageError(f"{option} {text}: expected a size such as 4GiB or 500MB, or a number of bytes")
    return int(amount)


Precision = Literal["exact", "fp8", "int8"]  # of a transformer


@dataclass(frozen=True)
class Compute:
    """Device, dtype and memory of the computation."""

    device: str | None = None
    """PyTorch device, such as cuda:1; None means CUDA if available, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the computation; None means bfloat16 on CUDA, else float32"""
    patch: bool = True
    """patch the model to use the fast operators"""
    max_memory: str | None = None
    """GPU memory limit of an autoencoder call, such as 4GiB or 500MB; None means all free memory; lower is slower"""
    int8: tuple[Path, ...] | None = None
    """the autoencoder computes in 8 bit, on a Hopper GPU: with the scales in a file of `calibrate`, or calibrated on
    pictures or folders, of which eight are taken; without a value, on the bundled photograph; None means exactly"""

    def __post_init__(self):
        if self.max_bytes is not None and not self.patch:
            raise UsageError(
                "--max-memory --no-patch: only a patched model can limit its memory; remove one of the options"
            )
        if self.int8 is not None and not self.patch:
            raise UsageError("--int8 --no-patch: only a patched model can compute in 8 bit; remove one of the options")
        if self.int8 and not self.scales:
            for path in self.int8:
                if path.suffix.lower() == ".safetensors":
                    raise UsageError(f"--int8: {path} is a file of scales; expected one such file, or pictures")
                if not path.exists():
                    raise UsageError(f"--int8: {path} does not exist; expected a file of `calibrate`, or pictures")

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes, as `dcae_fast.patch` takes it."""
        return None if self.max_memory is None else parse_bytes("--max-memory", self.max_memory)

    @property
    def scales(self) -> Path | None:
        """The file of scales that --int8 names, if it names one."""
        file = self.int8[0] if self.int8 and len(self.int8) == 1 else None
        return file if file is not None and file.suffix.lower() == ".safetensors" else None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `dcae_fast.patch`."""
        if self.int8 is None:
            return {"max_memory": self.max_bytes}
        source = self.scales or list(self.int8) or None
        return {"max_memory": self.max_bytes, "precision": "int8", "calibration": source}

    def load(self, model: str) -> "DCAE":
        """Loads an autoencoder, and patches it if `patch` is set."""
        from dcae_fast.reconstruction import load_model

        network = load_model(model, self.device, self.dtype)
        self.patch_model(network)
        return network

    def patch_model(self, network: "DCAE", cuda_graphs: bool | str = "auto") -> str:
        """Patches an autoencoder if `patch` is set. Returns its precision: "exact", or "int8" and the beginning of the
        hash of the scales. Called by all ranks; the main rank calibrates for all.

        Says so if 8 bit is asked for and the device has none. Raises CheckpointError for scales of other weights,
        UsageError if the model cannot be calibrated.
        """
        if not self.patch:
            return "exact"
        options = self.options
        if self.int8 is None:
            dcae_fast.patch(network, cuda_graphs=cuda_graphs, **options)
            return "exact"
        from dcae_fast import distributed
        from dcae_fast.fast import scales

        try:
            if self.scales is None:
                found = distributed.on_main(lambda: dcae_fast.patch(network, **options).calibration)
                options["calibration"] = found or options["calibration"]  # None without 8-bit kernels
            report = dcae_fast.patch(network, cuda_graphs=cuda_graphs, **options)
        except ValueError as error:
            raise UsageError(f"--int8: {error}") from error
        if not report.in_int8:
            distributed.print_main(f"--int8: {report.precision.splitlines()[-1]}", error=True)
            return "exact"
        if self.scales is None:
            distributed.print_main(report.calibration.summary)
        return f"int8 {scales.hash_of_scales(report.calibration)[:8]}"

    def load_diffusion(self, model: str, precision: Precision = "exact") -> tuple["DCAEDiffusion", str]:
        """Loads a diffusion model, and patches it, with CUDA graphs, if `patch` is set; and the precision: that of the
        autoencoder, see `patch_model`, and of the transformer unless it is exact.

        precision: of the transformer. Says so if the device has no such precision.
        """
        if precision != "exact" and not self.patch:
            raise UsageError(f"--precision {precision} --no-patch: only a patched model has 8 bit; remove an option")
        if precision != "exact" and self.dtype == "float32":
            raise UsageError(f"--precision {precision} --dtype float32: 8 bit is for half precision; remove an option")
        from dcae_fast import distributed, sample

        network = sample.load(model, self.device, self.dtype)
        of_autoencoder = self.patch_model(network.autoencoder, cuda_graphs=True)
        if self.patch:
            report = dcae_fast.patch(network.diffusion_model, cuda_graphs=True, frozen=True, precision=precision)
        if precision == "exact":
            return network, of_autoencoder
        if not (report.in_float8 or report.in_int8):
            distributed.print_main(f"--precision: {report.precision}", error=True)
            return network, of_autoencoder
        return network, f"{of_autoencoder}, transformer {precision}"


MAX_FAILURES_PRINTED = 20


def print_failed(failed: Sequence[tuple[str | Path, str]], more: str = "more") -> None:
    """Prints the first failed pictures (name, reason) to stderr; `more`: the words after the number of all others."""
    from dcae_fast import distributed

    for name, reason in failed[:MAX_FAILURES_PRINTED]:
        distributed.print_main(f"failed: {name}: {reason}", error=True)
    if len(failed) > MAX_FAILURES_PRINTED:
        distributed.print_main(f"... and {len(failed) - MAX_FAILURES_PRINTED} {more}", error=True)


def report_problems(failed: Sequence[tuple[str, str]], missing: dict[str, str]) -> int:
    """Prints the failed pictures (name, reason) and the reasons why networks are missing; returns the exit status.

    The exit status is 1 if there is any problem, else 0.
    """
    from dcae_fast import distributed

    print_failed(failed)
    for reason in missing.values():
        distributed.print_main(f"missing: {reason}", error=True)
    return 1 if failed or missing else 0
