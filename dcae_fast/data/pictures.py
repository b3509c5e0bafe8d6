"""Pictures on disk, in files or in tar shards, and their crops, which are the original's."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dcae_fast.images import MAX_PIXELS, centre_crop, grey_of_16_bits, opened, pixels_of

Named = list[tuple[str, str]]  # names and what is to be said of each


class Picture(NamedTuple):
    """name: path from the root, through a shard if in one; key: the same for its latent, without the suffix.

    label: class number; shard, offset: where its bytes are in which tar file, "" for a file of its own; size: bytes;
    time: when the file that holds it was changed, in ns.
    """

    name: str
    key: str
    label: int = 0
    shard: str = ""
    offset: int = 0
    size: int = 0
    time: int = 0


@dataclass
class Pictures:
    """Pictures under a folder, in the order of their latents' files. classes: names by number, or empty.

    ignored: (name, reason) of what is no picture; failed: of pictures and shards that cannot be taken; class_members:
    of each class, where `.cls` members hold names, the first of these members.
    """

    root: Path
    items: list[Picture]
    classes: tuple[str, ...] = ()
    ignored: Named = field(default_factory=list)
    failed: Named = field(default_factory=list)
    class_members: dict[str, str] = field(default_factory=dict)

    def read(self, number: int, prepare: Callable[[Image.Image], Image.Image], max_pixels: int) -> Image.Image:
        """A picture by its number, in a form that `prepare` gives it."""
        picture = self.items[number]
        if not picture.shard:
            with opened(self.root / picture.name, max_pixels) as image:
                return prepare(image)
        with open(self.root / picture.shard, "rb") as file:
            file.seek(picture.offset)
            content = io.BytesIO(file.read(picture.size))
        with opened(content, max_pixels) as image:
            return prepare(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """As torchvision has it, and so the original: not turned as the camera says, and without transparency.

    But grey of 16 bits, of which that would leave white, is brought to 8. ValueError for floating point.
    """
    grey = grey_of_16_bits(image)
    if grey is not None:
        image = Image.fromarray((255 * grey).round().astype(np.uint8))
    return image.convert("RGB")


class Crops(NamedTuple):
    """A batch: pixels [n, side, side, 3] of the pictures numbered `indices`; failed: (number, reason).

    pixels: uint8, or float32 from 0 to 255 where some picture has more than 8 bits.
    """

    pixels: torch.Tensor
    indices: list[int]
    failed: list[tuple[int, str]]


class CropDataset(Dataset):
    """Some of the pictures, cropped to the centre: items are (number, pixels [resolution, resolution, 3]).

    Of a picture that cannot be read an item is (number, reason). prepare: `to_rgb`, or `images.as_seen`.
    """

    def __init__(
        self,
        pictures: Pictures,
        indices: Sequence[int],
        resolution: int,
        prepare: Callable[[Image.Image], Image.Image] = to_rgb,
        max_pixels: int = MAX_PIXELS,
    ):
        self.pictures, self.indices, self.resolution = pictures, indices, resolution
        self.prepare, self.max_pixels = prepare, max_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor | str]:
        index = self.indices[position]
        try:
            crop = self.pictures.read(index, self._crop, self.max_pixels)
        except MemoryError:
            return index, "does not fit in memory"
        except Exception as error:  # Pillow raises anything for a broken file
            return index, getattr(error, "strerror", None) or str(error) or repr(error)
        return index, torch.from_numpy(pixels_of(crop))

    def _crop(self, image: Image.Image) -> Image.Image:
        return centre_crop(self.prepare(image), self.resolution, self.resolution)


def collate(items: list[tuple[int, torch.Tensor | str]]) -> Crops:
    """The items of a `CropDataset` as a batch of those that could be read."""
    read = [(index, item) for index, item in items if isinstance(item, torch.Tensor)]
    failed = [(index, item) for index, item in items if isinstance(item, str)]
    crops = [item for _, item in read]
    if any(crop.is_floating_point() for crop in crops):
        crops = [crop.float() for crop in crops]
    pixels = torch.stack(crops) if crops else torch.empty(0, dtype=torch.uint8)
    return Crops(pixels, [index for index, _ in read], failed)
