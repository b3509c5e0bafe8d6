"""dcae-fast cache-latents: a folder of pictures to a folder of latents, for training."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

import dcae_fast
from dcae_fast.data.folders import suffix_of
from dcae_fast.models.config import SCALES

from .common import Compute, UsageError, check_integer, check_workers, make_folder, pixel_limit

if TYPE_CHECKING:
    from dcae_fast.data.cache import Report
    from dcae_fast.data.pictures import Pictures

LISTED = 20  # pictures without a latent, in the terminal; the manifest has them all
SHOWN = 8  # of the names in a line


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
    member: str | None = None,
    as_original: bool = False,
    overwrite: bool = False,
    max_pixels: int | None = None,
    compute: Compute,
) -> int:
    """Encode pictures to latents multiplied by the scaling factor, for training; under torchrun on several GPUs.

    Resumes a run that was ended, and makes latents of pictures that changed anew. Photographs are turned as the camera
    says (EXIF), and transparency is put on white. The exit status is 1 if there are pictures or shards that could not
    be read; they are named.

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
        member: extension, as jpg or seg.png, of the picture to take where samples of a shard have several
        as_original: take pictures as the original does, without rotation by EXIF and with transparency left out
        overwrite: remove the latents that are in the folder, and make all anew
        max_pixels: pictures with more pixels are named and left out; by default Pillow's limit, 178956970
    """
    import torch

    from dcae_fast import distributed
    from dcae_fast.data.cache import cache_latents as cache
    from dcae_fast.data.cache import settings_of
    from dcae_fast.data.find import find_pictures
    from dcae_fast.data.manifest import DataError
    from dcae_fast.memory import out_of_memory_as
    from dcae_fast.models.autoencoder import DCAE
    from dcae_fast.reconstruction import choose_device

    if scale is not None and not SCALES[0] <= scale <= SCALES[1]:
        raise UsageError(f"--scale {scale}: expected a positive number, from {SCALES[0]:g} to {SCALES[1]:g}")
    check_integer("--resolution", resolution, least=1)
    check_integer("--batch", None if batch == "auto" else batch, least=1)
    check_workers(workers)
    limit = pixel_limit(max_pixels)
    place, dtype = choose_device(compute.device, compute.dtype)
    with distributed.process_group(place) as device:
        try:
            network = DCAE.from_pretrained(model).to(device, dtype, memory_format=torch.channels_last)
            settings = settings_of(network, model, scale, resolution, format, as_original)
            pictures = distributed.broadcast(find_pictures(images, member) if distributed.is_main() else None)
            distributed.print_main(_found(pictures))
            if compute.patch:
                dcae_fast.patch(network, max_memory=compute.max_bytes)
            if distributed.is_main():
                make_folder(out)
            batch = None if batch == "auto" else batch
            with out_of_memory_as(UsageError(f"--resolution {resolution}: a single picture does not fit in memory")):
                report = cache(pictures, out, network, settings, batch, workers, overwrite, limit)
        except DataError as error:
            raise UsageError(str(error)) from error
        distributed.print_main(_summary(report, out))
        for name, reason in report.skipped[:LISTED]:
            distributed.print_main(f"failed: {pictures.root / name}: {reason}", error=True)
        if len(report.skipped) > LISTED:
            distributed.print_main(f"... and {len(report.skipped) - LISTED} more, in the manifest", error=True)
    return 1 if report.skipped else 0


def _found(pictures: "Pictures") -> str:
    """What was found, by suffix, what is ignored, by reason, and the classes that `.cls` members name."""
    suffixes = Counter(suffix_of(picture.name) for picture in pictures.items)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
    lines = [f"{len(pictures.items)} pictures: {counts}"]
    reasons: dict[str, list[str]] = {}
    for name, reason in pictures.ignored:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        lines.append(f"ignored, {reason}: {_some(names)}")
    if pictures.class_members:
        classes = [f"{n} {name} ({pictures.class_members[name]})" for n, name in enumerate(pictures.classes)]
        lines.append(f"classes by name, with the first member that names each: {_some(classes)}")
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    more = f", ... and {len(names) - SHOWN} more, in the manifest" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _summary(report: "Report", out: Path) -> str:
    manifest, lines = report.manifest, []
    if report.encoded:
        rate = report.encoded / report.seconds
        lines.append(
            f"{report.encoded} latents in {report.seconds:.1f} s, {rate:.1f} images/s; "
            f"the device waited {100 * report.waited:.0f} % of the time"
        )
    if report.changed:
        lines.append(f"{report.changed} pictures changed since the last run; their old latents are removed")
    if report.kept:
        lines.append(f"{report.kept} latents were there already")
    if manifest.mean is not None:
        lines.append(f"mean {manifest.mean:.6f}, rms {manifest.rms:.6f}, std {manifest.std:.6f}, all latents, scaled")
    lines.append(f"{manifest.latents} latents of {manifest.images} pictures are in {out.resolve()}")
    return "\n".join(lines)
