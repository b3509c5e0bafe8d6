"""dcae-fast cache-latents: a folder of pictures to a folder of latents, for training."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

import dcae_fast

from .common import Compute, UsageError, check_workers

if TYPE_CHECKING:
    from dcae_fast.data.cache import Report

LISTED = 20  # pictures without a latent, in the terminal; the manifest has them all


def cache_latents(
    images: tyro.conf.Positional[Path],
    *,
    out: Path,
    model: str,
    resolution: int = 512,
    scale: float | None = None,
    format: Literal["npy", "safetensors"] = "npy",
    batch: int | Literal["auto"] = "auto",
    workers: int | None = None,
    compute: Compute,
) -> int:
    """Encode pictures to latents multiplied by the scaling factor, for training; under torchrun on several GPUs.

    A run that was ended goes on where it was. The exit status is 1 if there are pictures that could not be read.

    Args:
        images: folder of pictures, of class folders, or of WebDataset's .tar shards
        out: folder for the latents and manifest.json
        model: a name from `dcae-fast models`, a Hugging Face repository, a folder or a weight file
        resolution: of the centre crops, in pixels
        scale: scaling factor; by default the model's own
        format: a file for each picture, as the original has them (bfloat16 becomes float32), or one for 1024, and a run
            that was ended begins the one again that was not full
        batch: pictures encoded at once; by default what the free memory holds
        workers: processes of each rank that read pictures; by default its share of the cores
    """
    import torch

    from dcae_fast import distributed
    from dcae_fast.data.cache import cache_latents as cache
    from dcae_fast.data.cache import settings_of
    from dcae_fast.data.manifest import DataError
    from dcae_fast.data.pictures import find_pictures
    from dcae_fast.models.autoencoder import DCAE
    from dcae_fast.reconstruction import choose_device

    if scale is not None and not 0 < scale < math.inf:
        raise UsageError(f"--scale {scale}: expected a positive number")
    if batch != "auto" and batch < 1:
        raise UsageError(f"--batch {batch}: expected at least 1, or auto")
    check_workers(workers)
    place, dtype = choose_device(compute.device, compute.dtype)
    with distributed.process_group(place) as device:
        try:
            network = DCAE.from_pretrained(model).to(device, dtype, memory_format=torch.channels_last)
            settings = settings_of(network, model, scale, resolution, format)
            pictures = distributed.broadcast(find_pictures(images) if distributed.is_main() else None)
            if compute.patch:
                dcae_fast.patch(network)
            report = cache(pictures, out, network, settings, None if batch == "auto" else batch, workers)
        except DataError as error:
            raise UsageError(str(error)) from error
        except torch.OutOfMemoryError as error:
            reason = "a single picture does not fit in the device's memory"
            raise UsageError(f"--resolution {resolution}: {reason}") from error
        distributed.print_main(_summary(report, out))
        for name, reason in report.skipped[:LISTED]:
            distributed.print_main(f"failed: {images / name}: {reason}", error=True)
        if len(report.skipped) > LISTED:
            distributed.print_main(f"... and {len(report.skipped) - LISTED} more, in the manifest", error=True)
    return 1 if report.skipped else 0


def _summary(report: "Report", out: Path) -> str:
    manifest, lines = report.manifest, []
    if report.encoded:
        rate = report.encoded / report.seconds
        lines.append(
            f"{report.encoded} latents in {report.seconds:.1f} s, {rate:.1f} images/s; "
            f"the device waited {100 * report.waited:.0f} % of the time"
        )
    if report.kept:
        lines.append(f"{report.kept} latents were there already")
    if manifest.mean is not None:
        lines.append(f"mean {manifest.mean:.6f}, rms {manifest.rms:.6f}, std {manifest.std:.6f}, all latents, scaled")
    lines.append(f"{manifest.latents} latents of {manifest.images} pictures are in {out.resolve()}")
    return "\n".join(lines)
