"""The work of `cache-latents --buckets`: each aspect-ratio bucket is a folder of latents in itself."""

from dataclasses import replace
from pathlib import Path

from dcae_fast import distributed
from dcae_fast.images import MAX_PIXELS
from dcae_fast.lock import locked
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.workers import default_workers

from .buckets import Bucket, buckets_of, in_buckets, settings_of_bucket
from .cache import Report, cache_latents, open_folder
from .manifest import Manifest, Settings, statistics
from .pictures import Pictures


def cache_buckets(
    pictures: Pictures,
    folder: Path,
    model: DCAE,
    settings: Settings,
    batch: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Report:
    """`cache_latents` for each bucket, into a folder with the bucket's name, and then a manifest of all.

    settings: from `settings_of`, with buckets. A picture belongs to the bucket whose ratio of sides is nearest. If a
    changed picture belongs to another bucket than before, its old latent is removed.
    """
    empty = Manifest(settings, pictures.classes)
    with locked(folder):
        if distributed.is_main():
            open_folder(folder, empty, overwrite)
            empty.save(folder)
        parts = in_buckets(
            pictures,
            buckets_of(settings),
            settings.as_original,
            max_pixels,
            default_workers() if workers is None else workers,
        )
        used = distributed.on_main(lambda: [b for b in parts if parts[b].items or (folder / b.name).is_dir()])
        reports = {}
        for bucket in used:
            place, own = folder / bucket.name, settings_of_bucket(settings, bucket)
            reports[bucket] = cache_latents(
                parts[bucket], place, model, own, batch, workers, overwrite, max_pixels, pictures
            )
        report = _joined(pictures, empty, reports)
        if distributed.is_main():
            report.manifest.save(folder)
        distributed.barrier()
        return report


def _joined(pictures: Pictures, manifest: Manifest, reports: dict[Bucket, Report]) -> Report:
    """The report of all buckets, with the manifest of the folder that contains them."""
    each, manifests = list(reports.values()), [report.manifest for report in reports.values()]
    sums = [one for report in each for one in report.sums]
    skipped = [*pictures.failed, *(one for report in each for one in report.skipped)]
    manifest = replace(
        manifest,
        images=len(pictures.items),
        latents=sum(one.latents for one in manifests),
        captions=sum(one.captions for one in manifests),
        skipped=tuple(name for name, _ in skipped),
        ignored=(*(name for name, _ in pictures.ignored), *(name for one in manifests for name in one.ignored)),
        buckets=tuple(bucket.name for bucket, report in reports.items() if report.manifest.latents),
        **statistics(sums),
    )
    encoded, kept, changed = (sum(getattr(one, name) for one in each) for name in ("encoded", "kept", "changed"))
    seconds = sum(report.seconds for report in each)
    waited = sum(report.waited * report.seconds for report in each) / seconds if seconds else 0.0
    unusable = [one for report in each for one in report.unusable]
    return Report(manifest, encoded, kept, changed, skipped, seconds, waited, sums, unusable)
