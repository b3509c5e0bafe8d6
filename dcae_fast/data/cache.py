"""A folder of latents from pictures: made by all ranks, resumed, described by its manifest."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dcae_fast import distributed
from dcae_fast.models.autoencoder import DCAE

from .encode import BatchEncoder, automatic_batch, encode_batches
from .manifest import MANIFEST, DataError, Manifest, Settings, Sums, load_manifest, statistics, weights_hash
from .pictures import CropDataset, Pictures, collate
from .store import STORES, NpyStore, ShardStore

Store = NpyStore | ShardStore


@dataclass(frozen=True)
class Report:
    """What `cache_latents` did on all ranks. skipped: (name, reason) of pictures without a latent.

    encoded: latents made; kept: latents that were there; seconds: the slowest rank's, from the first picture read to
    the last latent written; waited: share of that time in which the devices did not compute, on average.
    """

    manifest: Manifest
    encoded: int
    kept: int
    skipped: list[tuple[str, str]]
    seconds: float
    waited: float


def settings_of(model: DCAE, name: str, scaling_factor: float | None, resolution: int, format: str) -> Settings:
    """The settings of latents that the model makes; scaling_factor: the model's own if None. Raises DataError."""
    factor, ratio = scaling_factor or model.scaling_factor, model.spatial_compression_ratio
    if factor is None:
        raise DataError(f"scale: none is known for {name}; give one, about 1 / rms of its latents")
    if resolution <= 0 or resolution % ratio:
        raise DataError(f"resolution {resolution}: expected a multiple of {ratio}, the model's ratio")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    shape = model.config.latent_channels, resolution // ratio, resolution // ratio
    return Settings(name, dtype, resolution, factor, format, weights_hash(model.encoder), shape)


def default_workers() -> int:
    """Processes that read pictures for this rank: its share of this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def cache_latents(
    pictures: Pictures,
    folder: Path,
    model: DCAE,
    settings: Settings,
    batch: int | None = None,
    workers: int | None = None,
) -> Report:
    """Writes the latents that are not there yet, all ranks together, and then the manifest.

    model: patched or not, on its device; settings: by `settings_of`; batch, workers: chosen here if None. Every latent
    is there and whole, or absent, whenever this is killed. Raises DataError where the folder holds other latents.
    """
    store = STORES[settings.format](folder, pictures.items, settings)
    if distributed.is_main():
        _prepare(folder, store, Manifest(settings, pictures.classes))
    distributed.barrier()
    units = -(-len(pictures.items) // store.unit)
    mine = distributed.share(units)
    there = store.scan(range(mine.start * store.unit, min(mine.stop * store.unit, len(pictures.items))))
    kept = {index: sums for part in distributed.all_gather(there) for index, sums in part.items()}
    missing = _share_of_missing(len(pictures.items), kept, store.unit)
    work = Work(pictures, store, model, settings, batch or automatic_batch(model, settings.resolution))
    work.run(missing, default_workers() if workers is None else workers)
    return _report(folder, pictures, Manifest(settings, pictures.classes), kept, distributed.all_gather(work.outcome()))


def _prepare(folder: Path, store: Store, manifest: Manifest) -> None:
    """Leaves a folder that has a manifest of these settings and nothing that a killed run left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    before, leftovers = load_manifest(folder), set(folder.rglob(".*.part"))
    if before is not None:
        manifest.settings.check_same(before.settings, folder)
        store.check_strays()
    elif not leftovers.issuperset(folder.iterdir()):
        raise DataError(f"{folder} is not empty and has no {MANIFEST}; take another folder")
    for leftover in leftovers:
        leftover.unlink()
    manifest.save(folder)


def _share_of_missing(count: int, kept: dict[int, Sums], unit: int) -> list[int]:
    """This rank's part of the numbers that are not kept: whole units, as many for every rank."""
    units: dict[int, list[int]] = {}
    for index in range(count):
        if index not in kept:
            units.setdefault(index // unit, []).append(index)
    parts = list(units.values())
    return [index for part in distributed.share(len(parts)) for index in parts[part]]


class Work:
    """One rank's part: encodes and writes latents, and remembers what became of them."""

    def __init__(self, pictures: Pictures, store: Store, model: DCAE, settings: Settings, batch: int):
        self.pictures, self.store, self.resolution = pictures, store, settings.resolution
        self.encode = BatchEncoder(model, settings.scaling_factor, batch)
        self.sums: dict[int, Sums] = {}
        self.failed: list[tuple[int, str]] = []
        self.seconds = self.busy = 0.0

    def run(self, indices: list[int], workers: int) -> None:
        batch, on_cuda = self.encode.batch, next(self.encode.model.parameters()).is_cuda
        dataset = CropDataset(self.pictures, indices, self.resolution)
        workers = min(workers, -(-len(indices) // batch))
        loader = DataLoader(dataset, batch, num_workers=workers, collate_fn=collate, pin_memory=on_cuda)
        begin = time.perf_counter()
        quiet = None if distributed.is_main() else True
        with tqdm(total=len(indices), unit="image", disable=quiet) as bar:
            for done in encode_batches(loader, self.encode, self.store.dtype, self._finish, self.store.writers):
                sums, failed = done.result
                self.sums |= sums
                self.failed += [*done.crops.failed, *failed]
                self.busy += done.seconds
                bar.update(len(done.crops.indices) + len(done.crops.failed))
        self.store.close()
        self.seconds = time.perf_counter() - begin

    def _finish(self, indices: list[int], latents: torch.Tensor) -> tuple[dict[int, Sums], list[tuple[int, str]]]:
        """Writes latents that are finite; their sums, and the others with the reason."""
        sums = {index: Sums.of(z.float().numpy()) for index, z in zip(indices, latents, strict=True)}
        fine = [row for row, index in enumerate(indices) if sums[index].finite]
        failed = [(index, "its latent is not finite") for index in indices if not sums[index].finite]
        self.store.write([indices[row] for row in fine], latents if not failed else latents[fine])
        return {index: sums[index] for index in indices if sums[index].finite}, failed

    def outcome(self) -> "Outcome":
        return Outcome(self.sums, self.failed, self.seconds, self.busy)


@dataclass(frozen=True)
class Outcome:
    """What a rank sends to the others: of the pictures, by number, and its times."""

    sums: dict[int, Sums]
    failed: list[tuple[int, str]]
    seconds: float
    busy: float


def _report(
    folder: Path, pictures: Pictures, manifest: Manifest, kept: dict[int, Sums], outcomes: list[Outcome]
) -> Report:
    """The report, the same on every rank; the manifest is complete on disk when this returns."""
    made = {index: sums for outcome in outcomes for index, sums in outcome.sums.items()}
    failed = sorted(each for outcome in outcomes for each in outcome.failed)
    skipped = [(pictures.items[index].name, reason) for index, reason in failed]
    manifest = replace(
        manifest,
        images=len(pictures.items),
        latents=len(kept) + len(made),
        skipped=tuple(name for name, _ in skipped),
        **statistics([*kept.values(), *made.values()]),
    )
    if distributed.is_main():
        manifest.save(folder)
    distributed.barrier()
    seconds, busy = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("seconds", "busy"))
    slowest = max(outcome.seconds for outcome in outcomes)
    encoded = sum(len(outcome.sums) for outcome in outcomes)
    return Report(manifest, encoded, len(kept), skipped, slowest, 1 - busy / seconds if seconds else 0.0)
