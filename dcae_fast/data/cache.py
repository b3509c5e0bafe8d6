"""The work of `cache-latents`: all ranks encode pictures to a folder of latents, with resuming and a manifest."""

import time
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

from .encode import BatchEncoder, automatic_batch, encode_batches
from .manifest import MANIFEST, Manifest, Settings, Sums, load_manifest, statistics, weights_hash
from .pictures import CropDataset, Pictures, collate, to_rgb
from .sources import keys_of_failed, load_sources, save_sources, sources_of
from .store import STORES, NpyStore, ShardStore

Store = NpyStore | ShardStore


@dataclass(frozen=True)
class Report:
    """The result of `cache_latents` on all ranks.

    encoded: number of new latents. kept: number of latents that existed already. changed: number of pictures that
    changed since their latents were encoded. skipped: (name, reason) of each picture or shard that gave no latent.
    seconds: time of the slowest rank from the first picture read to the last latent written. waited: the fraction of
    that time in which the devices were idle, averaged over the ranks.
    """

    manifest: Manifest
    encoded: int
    kept: int
    changed: int
    skipped: list[tuple[str, str]]
    seconds: float
    waited: float


def settings_of(
    model: DCAE,
    name: str,
    scaling_factor: float | None,
    resolution: int,
    format: str,
    as_original: bool = False,
    precision: str = "exact",
) -> Settings:
    """The settings of the latents of a model.

    name: as the user named the model. scaling_factor: None means the model's scaling factor. precision: see `Settings`.
    Raises DataError if the scaling factor is unknown or the resolution is not a multiple of the model's ratio.
    """
    factor, ratio = scaling_factor or model.scaling_factor, model.spatial_compression_ratio
    if factor is None:
        raise DataError(f"--scale: the scaling factor of {name} is unknown; give one, about 1 / rms of its latents")
    if resolution <= 0 or resolution % ratio:
        raise DataError(f"--resolution {resolution}: expected a multiple of {ratio}, the model's compression ratio")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    shape = model.config.latent_channels, resolution // ratio, resolution // ratio
    return Settings(name, dtype, resolution, factor, format, weights_hash(model.encoder), shape, as_original, precision)


def cache_latents(
    pictures: Pictures,
    folder: Path,
    model: DCAE,
    settings: Settings,
    batch: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Report:
    """Encodes the pictures that have no latent yet, on all ranks together, and then writes the manifest.

    model: on its device, patched or not. settings: from `settings_of`. batch, workers: None chooses them automatically.
    overwrite: first delete all latents in the folder. max_pixels: limit per picture. Pictures that changed are encoded
    again. If the process is killed, each latent is either complete or absent. Raises DataError if the folder contains
    latents with other settings, and LockedError if another process is working in the folder.
    """
    store, empty = STORES[settings.format](folder, pictures.items, settings), Manifest(settings, pictures.classes)
    workers = default_workers() if workers is None else workers
    with locked(folder):
        if distributed.is_main():
            _prepare(folder, pictures, store, empty, overwrite)
        store.changed = distributed.broadcast(store.changed)
        units = -(-len(pictures.items) // store.unit)
        mine = distributed.share(units)
        existing = store.scan(range(mine.start * store.unit, min(mine.stop * store.unit, len(pictures.items))))
        kept = {index: sums for part in distributed.all_gather(existing) for index, sums in part.items()}
        if distributed.is_main():  # only now: no latent of a changed picture is left
            save_sources(folder, sources_of(pictures.items))
        distributed.barrier()
        missing = _share_of_missing(len(pictures.items), kept, store.unit)
        encode = BatchEncoder(model, settings.scaling_factor, batch or automatic_batch(model, settings.resolution))
        prepare = to_rgb if settings.as_original else as_seen
        dataset = CropDataset(pictures, missing, settings.resolution, prepare, max_pixels)
        outcomes = distributed.all_gather(_encode(dataset, store, encode, workers))
        return _report(folder, pictures, empty, len(store.changed), kept, outcomes)


def _prepare(folder: Path, pictures: Pictures, store: Store, manifest: Manifest, overwrite: bool) -> None:
    """Checks the settings of an existing folder, removes temporary files of killed runs, and writes the manifest.

    Sets `store.changed` to the keys of the pictures that changed. Raises DataError.
    """
    before = load_manifest(folder)
    if before is None and not is_unused(folder):
        raise DataError(f"{folder} is not empty and has no {MANIFEST}; choose another folder")
    for leftover in leftovers(folder):
        leftover.unlink()
    if before is not None and overwrite:
        for path in STORES[before.settings.format].files(folder):
            path.unlink()
    elif before is not None:
        manifest.settings.check_same(before.settings, folder)
        now, then = sources_of(pictures.items), load_sources(folder)
        store.check_strays(keys_of_failed({key: then[key] for key in then.keys() - now.keys()}, pictures.failed))
        store.changed = {key for key in now if then.get(key, now[key]) != now[key]}
    manifest.save(folder)


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


def _encode(dataset: CropDataset, store: Store, encode: BatchEncoder, workers: int) -> Outcome:
    """Encodes this rank's pictures and writes their latents."""
    outcome = Outcome()
    workers = min(workers, -(-len(dataset) // encode.batch))
    on_cuda = next(encode.model.parameters()).is_cuda
    options = {"num_workers": workers, "worker_init_fn": ignore_interruptions}
    loader = DataLoader(dataset, encode.batch, collate_fn=collate, pin_memory=on_cuda, **options)
    finish = partial(_write, store, not_finite_message(["its latent"], encode.dtype))
    begin = time.perf_counter()
    with tqdm(total=len(dataset), unit="image", disable=None if distributed.is_main() else True) as bar:
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
    manifest: Manifest,
    changed: int,
    kept: dict[int, Sums],
    outcomes: list[Outcome],
) -> Report:
    """Writes the final manifest, and returns the report, which is equal on all ranks."""
    made = {index: sums for outcome in outcomes for index, sums in outcome.sums.items()}
    failed = sorted(each for outcome in outcomes for each in outcome.failed)
    skipped = [*pictures.failed, *((pictures.items[index].name, reason) for index, reason in failed)]
    manifest = replace(
        manifest,
        images=len(pictures.items),
        latents=len(kept) + len(made),
        skipped=tuple(name for name, _ in skipped),
        ignored=tuple(name for name, _ in pictures.ignored),
        **statistics([*kept.values(), *made.values()]),
    )
    if distributed.is_main():
        manifest.save(folder)
    distributed.barrier()
    seconds, busy = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("seconds", "busy"))
    slowest = max(outcome.seconds for outcome in outcomes)
    encoded, waited = sum(len(outcome.sums) for outcome in outcomes), 1 - busy / seconds if seconds else 0.0
    return Report(manifest, encoded, len(kept), changed, skipped, slowest, waited)
