"""The work of `cache-latents`: all ranks encode pictures to a folder of latents, with resuming and a manifest."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dcae_fast import distributed
from dcae_fast.errors import DataError
from dcae_fast.files import leftovers
from dcae_fast.finite import finite_rows, not_finite_message
from dcae_fast.images import MAX_PIXELS, as_seen
from dcae_fast.interruption import ignore_interruptions
from dcae_fast.lock import is_unused, locked
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.workers import default_workers

from .buckets import buckets_of, settings_of_bucket
from .captions import CAPTIONS, Found, read_captions, save_captions
from .encode import BatchEncoder, automatic_batch, encode_batches
from .manifest import MANIFEST, Manifest, Settings, Sums, load_manifest, statistics, weights_hash
from .pictures import CropDataset, Notes, Pictures, collate, to_rgb
from .sources import SOURCES, keys_of_removed, load_sources, save_sources, sources_of
from .store import STORES, NpyStore, ShardStore

Store = NpyStore | ShardStore


@dataclass(frozen=True)
class Report:
    """The result of `cache_latents` on all ranks.

    encoded: number of new latents. kept: number of latents that existed already. changed: number of pictures that
    changed since their latents were encoded. skipped: (name, reason) of each picture or shard that gave no latent.
    seconds: time of the slowest rank from the first picture read to the last latent written. waited: the fraction of
    that time in which the devices were idle, averaged over the ranks. sums: of each latent. unusable: (name, reason) of
    each file or member that should contain a caption and contains none.
    """

    manifest: Manifest
    encoded: int
    kept: int
    changed: int
    skipped: list[tuple[str, str]]
    seconds: float
    waited: float
    sums: list[Sums]
    unusable: Notes


def settings_of(
    model: DCAE,
    name: str,
    scaling_factor: float | None,
    resolution: int,
    format: str,
    as_original: bool = False,
    precision: str = "exact",
    buckets: bool = False,
) -> Settings:
    """The settings of the latents of a model.

    name: as the user named the model. scaling_factor: None means the model's scaling factor. precision, buckets: see
    `Settings`.
    Raises DataError if the scaling factor is unknown or the resolution is not a multiple of the model's ratio.
    """
    factor, ratio = scaling_factor or model.scaling_factor, model.spatial_compression_ratio
    if factor is None:
        raise DataError(f"--scale: the scaling factor of {name} is unknown; give one, about 1 / rms of its latents")
    if resolution <= 0 or resolution % ratio:
        raise DataError(f"--resolution {resolution}: expected a multiple of {ratio}, the model's compression ratio")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    shape = model.config.latent_channels, resolution // ratio, resolution // ratio
    weights = weights_hash(model.encoder)
    return Settings(name, dtype, resolution, factor, format, weights, shape, as_original, precision, buckets)


def cache_latents(
    pictures: Pictures,
    folder: Path,
    model: DCAE,
    settings: Settings,
    batch: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    whole: Pictures | None = None,
) -> Report:
    """Encodes the pictures that have no latent yet, on all ranks together, and then writes the manifest.

    model: on its device, patched or not. settings: from `settings_of`, without buckets. batch, workers: None chooses
    them automatically. overwrite: first delete all latents in the folder. max_pixels: limit per picture. whole: all
    pictures, if `pictures` are the part that belongs into this folder; latents of the others are removed. Pictures that
    changed are encoded again. The captions found beside the pictures are written to captions.json. If the process is
    killed, each latent is either complete or absent. Raises DataError if the folder contains latents with other
    settings, and LockedError if another process is working in the folder.
    """
    store, empty = STORES[settings.format](folder, pictures.items, settings), Manifest(settings, pictures.classes)
    workers = default_workers() if workers is None else workers
    size = tuple(side * model.spatial_compression_ratio for side in settings.shape[1:])
    with locked(folder):
        if distributed.is_main():
            _prepare(folder, pictures, whole or pictures, store, empty, overwrite)
        store.changed = distributed.broadcast(store.changed)
        units = -(-len(pictures.items) // store.unit)
        mine = distributed.share(units)
        existing = store.scan(range(mine.start * store.unit, min(mine.stop * store.unit, len(pictures.items))))
        kept = {index: sums for part in distributed.all_gather(existing) for index, sums in part.items()}
        if distributed.is_main():  # only now: no latent of a changed picture is left
            save_sources(folder, sources_of(pictures.items))
        found = read_captions(pictures)
        if distributed.is_main():
            save_captions(folder, found.captions)
        distributed.barrier()
        missing = _share_of_missing(len(pictures.items), kept, store.unit)
        encode = BatchEncoder(model, settings.scaling_factor, batch or automatic_batch(model, math.prod(size)))
        prepare = to_rgb if settings.as_original else as_seen
        dataset = CropDataset(pictures, missing, size, prepare, max_pixels)
        outcomes = distributed.all_gather(_encode(dataset, store, encode, workers, folder.name if whole else None))
        return _report(folder, pictures, found, empty, len(store.changed), kept, outcomes)


def _prepare(
    folder: Path, pictures: Pictures, whole: Pictures, store: Store, manifest: Manifest, overwrite: bool
) -> None:
    """Opens the folder, and removes the latents of pictures that failed or belong into another folder.

    Sets `store.changed` to the keys of the pictures that changed. Raises DataError.
    """
    if open_folder(folder, manifest, overwrite):
        now, then = sources_of(pictures.items), load_sources(folder)
        others = {key: then[key] for key in then.keys() - now.keys()}
        elsewhere = {picture.name for picture in whole.items} if others and whole is not pictures else set()
        store.check_strays(keys_of_removed(others, whole.failed, elsewhere))
        store.changed = {key for key in now if then.get(key, now[key]) != now[key]}
    manifest.save(folder)


def open_folder(folder: Path, manifest: Manifest, overwrite: bool) -> bool:
    """Checks the settings of an existing folder, and removes temporary files of killed runs.

    Returns whether the folder has latents to keep. Raises DataError.
    """
    before = load_manifest(folder)
    if before is None and not is_unused(folder):
        raise DataError(f"{folder} is not empty and has no {MANIFEST}; choose another folder")
    for leftover in leftovers(folder):
        leftover.unlink()
    if before is not None and (overwrite or not _has_latents(folder, before.settings)):
        _remove_latents(folder, before.settings)
    elif before is not None:
        manifest.settings.check_same(before.settings, folder)
        return True
    return False


def _has_latents(folder: Path, settings: Settings) -> bool:
    """Whether there is any latent; none if a run was interrupted at once, or if no picture could be read."""
    folders = [folder, *(folder / bucket.name for bucket in buckets_of(settings))]
    return any(STORES[settings.format].files(each) for each in folders)


def _remove_latents(folder: Path, settings: Settings) -> None:
    for bucket in buckets_of(settings):
        inner = folder / bucket.name
        _remove_latents(inner, settings_of_bucket(settings, bucket))
        for name in (MANIFEST, SOURCES, CAPTIONS):
            (inner / name).unlink(missing_ok=True)
        for path in (*sorted(inner.rglob("*"), reverse=True), inner):  # the folders of classes, from inside
            with suppress(OSError):
                path.rmdir()
    for path in STORES[settings.format].files(folder):
        path.unlink()


def _share_of_missing(count: int, kept: dict[int, Sums], unit: int) -> list[int]:
    """This rank's part of the picture numbers without a kept latent. The ranks' unit counts differ by at most one."""
    units: dict[int, list[int]] = {}
    for index in range(count):
        if index not in kept:
            units.setdefault(index // unit, []).append(index)
    parts = list(units.values())
    return [index for part in distributed.share(len(parts)) for index in parts[part]]


@dataclass
class Outcome:
    """The result of one rank, by picture number. seconds: time taken; busy: the part in which the device computed."""

    sums: dict[int, Sums] = field(default_factory=dict)
    failed: list[tuple[int, str]] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0


def _encode(dataset: CropDataset, store: Store, encode: BatchEncoder, workers: int, name: str | None) -> Outcome:
    """Encodes this rank's pictures and writes their latents. name: printed before the progress."""
    outcome = Outcome()
    workers = min(workers, -(-len(dataset) // encode.batch))
    on_cuda = next(encode.model.parameters()).is_cuda
    options = {"num_workers": workers, "worker_init_fn": ignore_interruptions}
    loader = DataLoader(dataset, encode.batch, collate_fn=collate, pin_memory=on_cuda, **options)
    finish = partial(_write, store, not_finite_message(["its latent"], encode.dtype))
    begin = time.perf_counter()
    hidden = None if distributed.is_main() else True
    with tqdm(total=len(dataset), desc=name, unit="image", disable=hidden) as bar:
        for done in encode_batches(loader, encode, store.dtype, finish, store.writers):
            sums, failed = done.result
            outcome.sums |= sums
            outcome.failed += [*done.crops.failed, *failed]
            outcome.busy += done.seconds
            bar.update(len(done.crops.indices) + len(done.crops.failed))
    store.close()
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _write(
    store: Store, reason: str, indices: list[int], latents: torch.Tensor
) -> tuple[dict[int, Sums], list[tuple[int, str]]]:
    """Writes the finite latents. Returns their sums by picture number, and (number, reason) of the others."""
    finite = finite_rows(latents)
    failed = [(index, reason) for index, fine in zip(indices, finite, strict=True) if not fine]
    if failed:
        rows = [row for row, fine in enumerate(finite) if fine]
        indices, latents = [indices[row] for row in rows], latents[rows]
    store.write(indices, latents)
    return {index: Sums.of(z.float().numpy()) for index, z in zip(indices, latents, strict=True)}, failed


def _report(
    folder: Path,
    pictures: Pictures,
    found: Found,
    manifest: Manifest,
    changed: int,
    kept: dict[int, Sums],
    outcomes: list[Outcome],
) -> Report:
    """Writes the final manifest, and returns the report, which is equal on all ranks."""
    made = {index: sums for outcome in outcomes for index, sums in outcome.sums.items()}
    failed = sorted(each for outcome in outcomes for each in outcome.failed)
    skipped = [*pictures.failed, *((pictures.items[index].name, reason) for index, reason in failed)]
    sums = [*kept.values(), *made.values()]
    manifest = replace(
        manifest,
        images=len(pictures.items),
        latents=len(kept) + len(made),
        skipped=tuple(name for name, _ in skipped),
        ignored=tuple(name for name, _ in [*pictures.ignored, *found.unusable]),
        captions=len(found.captions),
        **statistics(sums),
    )
    if distributed.is_main():
        manifest.save(folder)
    distributed.barrier()
    seconds, busy = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("seconds", "busy"))
    slowest = max(outcome.seconds for outcome in outcomes)
    encoded, waited = sum(len(outcome.sums) for outcome in outcomes), 1 - busy / seconds if seconds else 0.0
    return Report(manifest, encoded, len(kept), changed, skipped, slowest, waited, sums, found.unusable)
