"""Random crops of photographs. Every draw is a function of the seed, the step and the place in the batch."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from dcae_fast import distributed
from dcae_fast.data.find import find_pictures
from dcae_fast.data.pictures import Notes, Pictures, to_rgb
from dcae_fast.errors import DataError
from dcae_fast.images import MAX_PIXELS
from dcae_fast.interruption import ignore_interruptions
from dcae_fast.training.engine.batches import BatchOrder

from .config import AutoencoderRecipe, AutoencoderRun

FEW = 500  # pictures whose sizes are read without worker processes
MAX_PRINTED = 20


class Drawn(NamedTuple):
    """An item of a batch. step: number of the step, from 0. place: in the whole batch. number: of the picture."""

    step: int
    place: int
    number: int


class CropOrder(Sampler[list[Drawn]]):
    """For each of the given steps, the items in part `rank` of `ranks` of the batch, in the order of `BatchOrder`.

    If there are fewer pictures than items in a batch, a batch has several crops of a picture.
    """

    def __init__(self, pictures: int, batch: int, shards: int, seed: int, steps: range, rank: int, ranks: int):
        self.pictures = pictures
        repeated = pictures * -(-batch // pictures) if pictures < batch else pictures
        self.order = BatchOrder(repeated, batch, shards, seed, steps, rank, ranks)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[Drawn]]:
        first = self.order.part.start
        for step, batch in zip(self.order.steps, self.order, strict=True):
            yield [Drawn(step, first + place, number % self.pictures) for place, number in enumerate(batch)]


class RandomCrops(Dataset):
    """Random square crops, resized to the resolution and perhaps mirrored: uint8 [resolution, resolution, 3].

    A picture that cannot be decoded is named once, and the next picture takes its place. DataError if no picture can.
    """

    def __init__(self, pictures: Pictures, recipe: AutoencoderRecipe, max_pixels: int):
        self.pictures, self.recipe, self.max_pixels = pictures, recipe, max_pixels
        self.bad: set[int] = set()

    def __getitem__(self, drawn: Drawn) -> torch.Tensor:
        count = len(self.pictures.items)
        draws = np.random.default_rng((self.recipe.seed, drawn.step, drawn.place)).random(4)
        for number in ((drawn.number + offset) % count for offset in range(count)):
            if number in self.bad:
                continue
            try:
                crop = self.pictures.read(number, lambda image: self._crop(image, *draws), self.max_pixels)
                return torch.from_numpy(np.array(crop))
            except MemoryError:
                raise
            except Exception as error:  # for a broken file, Pillow may raise any exception
                self.bad.add(number)
                name, reason = self.pictures.root / self.pictures.items[number].name, str(error) or repr(error)
                print(f"failed: {name}: {reason}; the next picture takes its place", file=sys.stderr, flush=True)
        raise DataError(f"{self.pictures.root}: none of the {count} pictures can be read")

    def _crop(self, image: Image.Image, scale: float, top: float, left: float, flip: float) -> Image.Image:
        """The crop for four numbers in [0, 1)."""
        low, high = self.recipe.crop_scale
        size, shorter = self.recipe.resolution, min(image.size)
        side = min(shorter, max(size, round(shorter * (low + (high - low) * scale))))
        # a large JPEG file is decoded at 1/2, 1/4 or 1/8 of its size, if this is not smaller than needed
        image.draft(None, (image.width * size // side, image.height * size // side))
        side *= min(image.size) / shorter
        image = to_rgb(image)
        x, y = (
            min(int(at * (length - side + 1)), length - side)
            for at, length in zip((left, top), image.size, strict=True)
        )
        image = image.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.recipe.flip and flip < 0.5 else image


class ShorterSides(Dataset):
    """Items (number, shorter side in pixels), or (number, reason) for pictures that cannot be opened."""

    def __init__(self, pictures: Pictures, numbers: range, max_pixels: int):
        self.pictures, self.numbers, self.max_pixels = pictures, numbers, max_pixels

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> tuple[int, int | str]:
        number = self.numbers[position]
        try:
            return number, self.pictures.read(number, lambda image: min(image.size), self.max_pixels)
        except Exception as error:  # for a broken file, Pillow may raise any exception
            return number, str(error) or repr(error)


def usable_pictures(recipe: AutoencoderRecipe, run: AutoencoderRun) -> tuple[Pictures, Notes]:
    """The pictures of `run.data` to train on, and (name, reason) of those that cannot be used. Called by all ranks.

    Opens all pictures for their sizes; each rank opens its share. Raises DataError if no picture is left.
    """
    pictures = find(run.data)
    sides = _shorter_sides(pictures, max_pixels_of(run), run.workers)
    skipped, kept = list(pictures.failed), []
    for picture, side in zip(pictures.items, sides, strict=True):
        if isinstance(side, str):
            skipped.append((picture.name, side))
        elif recipe.small == "skip" and side < recipe.resolution:
            skipped.append((picture.name, f"its shorter side has {side} pixels; expected {recipe.resolution} or more"))
        else:
            kept.append(picture)
    if not kept:
        reasons = [f"{pictures.root / name}: {reason}" for name, reason in skipped[:MAX_PRINTED]]
        advice = f"{run.data}: found no picture to train on; see --small, --resolution and --max-pixels"
        raise DataError("\n".join([advice, *reasons]))
    return replace(pictures, items=kept, failed=skipped), skipped


def find(folder: Path) -> Pictures:
    """`find_pictures`, by the main rank for all ranks."""
    return distributed.on_main(lambda: find_pictures(folder))


def max_pixels_of(run: AutoencoderRun) -> int:
    return run.max_pixels or MAX_PIXELS


def _shorter_sides(pictures: Pictures, max_pixels: int, workers: int) -> list[int | str]:
    share = distributed.share(len(pictures.items))
    if len(share) > FEW:
        distributed.print_main(f"Reading the sizes of {len(pictures.items)} pictures")
    dataset = ShorterSides(pictures, share, max_pixels)
    options = {"collate_fn": list, "worker_init_fn": ignore_interruptions}
    loader = DataLoader(dataset, 100, num_workers=workers if len(share) > FEW else 0, **options)
    mine = [side for items in loader for _, side in items]
    return [side for part in distributed.all_gather(mine) for side in part]


def print_notes(title: str, notes: Notes) -> None:
    """Prints the first pictures (name, reason) to stderr, by the main rank."""
    for name, reason in notes[:MAX_PRINTED]:
        distributed.print_main(f"{title}: {name}: {reason}", error=True)
    if len(notes) > MAX_PRINTED:
        distributed.print_main(f"{title}: {len(notes) - MAX_PRINTED} more", error=True)
