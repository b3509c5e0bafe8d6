"""dcae-fast cache-latents: encodes a folder of pictures to a folder of latents, for training."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from dcae_fast.data.folders import suffix_of
from dcae_fast.errors import DataError
from dcae_fast.models.config import SCALES

from .common import Compute, UsageError, check_integer, check_workers, make_folder, pixel_limit, print_failed

if TYPE_CHECKING:
    from dcae_fast.data.cache import Report
    from dcae_fast.data.pictures import Pictures

MAX_NAMES_PRINTED = 8  # in one line


def cache_latents(
    images: tyro.conf.Positional[Path],
    *,
    out: Path,
    model: str,
    resolution: int = 512,
    buckets: bool = False,
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
    """Encode pictures to latents for training, multiplied by the scaling factor. Under torchrun, uses several GPUs.

    The same command resumes an interrupted run, and encodes changed pictures again; with --format safetensors, it
    starts an incomplete file again. Pictures are rotated as their EXIF data says, and transparency is composited on
    white. The caption of photo.jpg is read from photo.txt or, as "caption", from photo.json; captions.json contains
    all. The exit status is 1 if any picture or shard could not be read; the command prints their names.

    Args:
        images: folder of pictures, of class folders, or of WebDataset .tar shards
        out: output folder for the latents and manifest.json
        model: model name (see `dcae-fast models`), Hugging Face repository, folder or weight file
        resolution: side of the square centre crop of each picture, in pixels
        buckets: crop each picture to one of several sizes of about resolution² pixels, the nearest to its own ratio of
            sides; the latents of each size go to a folder of their own
        scale: scaling factor; None means the model's scaling factor
        format: npy: a file per picture, as in DC-Gen, bfloat16 stored as float32; safetensors: a file per 1024 pictures
        batch: number of pictures encoded at once; auto means as many as the free memory holds
        workers: picture-reading processes per rank; None means the rank's share of the CPU cores
        member: extension, such as jpg or seg.png, of the picture to encode where a shard's samples contain several
        as_original: read pictures as DC-Gen does: ignore EXIF rotation, and drop the transparency channel
        overwrite: delete all latents in the output folder and encode everything again
        max_pixels: skip and report pictures with more pixels; None means Pillow's limit, 178956970
    """
    import torch

    from dcae_fast import distributed
    from dcae_fast.data import cache, cache_buckets
    from dcae_fast.data.find import find_pictures
    from dcae_fast.data.manifest import MANIFEST
    from dcae_fast.memory import out_of_memory_as
    from dcae_fast.models.autoencoder import DCAE
    from dcae_fast.reconstruction import choose_device

    if scale is not None and not SCALES[0] <= scale <= SCALES[1]:
        raise UsageError(f"--scale {scale}: expected a number from {SCALES[0]:g} to {SCALES[1]:g}")
    check_integer("--resolution", resolution, least=1)
    check_integer("--batch", None if batch == "auto" else batch, least=1)
    check_workers(workers)
    if member is not None and not member.strip("."):
        raise UsageError(f"--member {member!r}: expected an extension, such as jpg or seg.png")
    limit = pixel_limit(max_pixels)
    place, dtype = choose_device(compute.device, compute.dtype)
    with distributed.process_group(place) as device:
        try:
            network = DCAE.from_pretrained(model).to(device, dtype, memory_format=torch.channels_last)
            precision = compute.patch_model(network)
            settings = cache.settings_of(network, model, scale, resolution, format, as_original, precision, buckets)
            pictures = distributed.broadcast(find_pictures(images, member) if distributed.is_main() else None)
            distributed.print_main(_found(pictures))
            if distributed.is_main():
                make_folder(out)
            batch = None if batch == "auto" else batch
            too_large = f"--resolution {resolution}: a single picture does not fit in memory; try a lower resolution"
            with out_of_memory_as(UsageError(too_large)):
                encode = cache_buckets.cache_buckets if buckets else cache.cache_latents
                report = encode(pictures, out, network, settings, batch, workers, overwrite, limit)
        except DataError as error:
            raise UsageError(str(error)) from error
        distributed.print_main(_summary(report, out))
        failed = [(pictures.root / name, reason) for name, reason in report.skipped]
        print_failed(failed, f"more; all are listed in {out / MANIFEST}")
    return 1 if report.skipped else 0


def _found(pictures: "Pictures") -> str:
    """Text: how many pictures each suffix has, ignored files by reason, and the class names found in `.cls` members."""
    suffixes = Counter(suffix_of(picture.name) for picture in pictures.items)
    counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
    lines = [f"{len(pictures.items)} pictures: {counts}"]
    reasons: dict[str, list[str]] = {}
    for name, reason in pictures.ignored:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        lines.append(f"ignored, {reason}: {_some_of(names)}")
    if pictures.class_members:
        classes = [f"{n} {name} ({pictures.class_members[name]})" for n, name in enumerate(pictures.classes)]
        lines.append(f"class names, each with the first member that contains it: {_some_of(classes)}")
    return "\n".join(lines)


def _some_of(names: Sequence[str]) -> str:
    hidden = len(names) - MAX_NAMES_PRINTED
    more = f", ... and {hidden} more, listed in the manifest" if hidden > 0 else ""
    return f"{', '.join(names[:MAX_NAMES_PRINTED])}{more}"


def _summary(report: "Report", out: Path) -> str:
    manifest, lines = report.manifest, []
    if report.encoded:
        rate = report.encoded / report.seconds
        lines.append(
            f"{report.encoded} latents in {report.seconds:.1f} s, {rate:.1f} images/s; "
            f"the device waited {100 * report.waited:.0f} % of the time"
        )
    if report.changed:
        lines.append(f"{report.changed} pictures changed since the last run; their old latents were removed")
    if report.kept:
        lines.append(f"{report.kept} latents existed already")
    if manifest.captions:
        lines.append(f"{manifest.captions} captions")
    if report.unusable:
        lines.append(f"no caption in {_some_of([f'{name} ({reason})' for name, reason in report.unusable])}")
    if manifest.buckets:
        lines.append(f"{len(manifest.buckets)} sizes: {_some_of(manifest.buckets)}")
    if manifest.mean is not None:
        lines.append(f"mean {manifest.mean:.6f}, rms {manifest.rms:.6f}, std {manifest.std:.6f} of all scaled latents")
    lines.append(f"{manifest.latents} latents of {manifest.images} pictures are in {out.resolve()}")
    return "\n".join(lines)
