"""Pictures in files or in tar shards, and a dataset of their centre crops, which equal DC-Gen's crops."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dcae_fast.images import MAX_PIXELS, centre_crop, grey_of_16_bits, opened, pixels_of

T = TypeVar("T")
Notes = list[tuple[str, str]]  # (name, reason)
CAPTION_SUFFIXES = (".txt", ".json")  # in the order of preference


class Caption(NamedTuple):
    """A .txt or .json file, or the member of a shard, that may contain a picture's caption. Fields as of `Picture`."""

    name: str
    offset: int = 0
    size: int = 0


class Picture(NamedTuple):
    """name: path relative to the root; for a shard's member, the shard's path, "/" and the member's path.

    key: path of its latent, without suffix. label: class number. shard, offset: the tar file and the position in it;
    shard is "" if the picture is a file. size: in bytes. time: modification time of the picture's file or shard, in ns.
    captions: files or members of the same shard that may contain its caption; the first that does counts.
    """

    name: str
    key: str
    label: int = 0
    shard: str = ""
    offset: int = 0
    size: int = 0
    time: int = 0
    captions: tuple[Caption, ...] = ()


@dataclass
class Pictures:
    """The pictures below a folder, sorted by the path of their latents.

    classes: class names by number; empty without classes. ignored: files that are not pictures. failed: pictures and
    shards that cannot be used. class_members: for each class name found in `.cls` members, the first such member.
    """

    root: Path
    items: list[Picture]
    classes: tuple[str, ...] = ()
    ignored: Notes = field(default_factory=list)
    failed: Notes = field(default_factory=list)
    class_members: dict[str, str] = field(default_factory=dict)

    def read(self, number: int, prepare: Callable[[Image.Image], T], max_pixels: int) -> T:
        """Opens the picture with this number and returns prepare(picture)."""
        picture = self.items[number]
        if not picture.shard:
            with opened(self.root / picture.name, max_pixels) as image:
                return prepare(image)
        with open(self.root / picture.shard, "rb", buffering=0) as file:
            content = io.BufferedReader(_Member(file, picture.offset, picture.size))
            with opened(content, max_pixels) as image:
                return prepare(image)


class _Member(io.RawIOBase):
    """The bytes of a file from `start` on, `size` many, read as they are needed."""

    def __init__(self, file: io.RawIOBase, start: int, size: int):
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence])
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.position)])
        self.position += count
        return count


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB as torchvision and DC-Gen do: ignores the EXIF rotation, and drops the transparency channel.

    Only 16-bit grey differs: it is reduced to 8 bits, where torchvision would turn nearly everything white. Raises
    ValueError for floating-point pixels.
    """
    grey = grey_of_16_bits(image)
    if grey is not None:
        image = Image.fromarray((255 * grey).round().astype(np.uint8))
    return image.convert("RGB")


class Crops(NamedTuple):
    """A batch of crops. indices: picture numbers. failed: (number, reason) of pictures that could not be read.

    pixels: [n, height, width, 3] uint8, or float32 in 0 … 255 if any picture has more than 8 bits.
    """

    pixels: torch.Tensor
    indices: list[int]
    failed: list[tuple[int, str]]


class CropDataset(Dataset):
    """Centre crops of the pictures numbered `indices`: items (number, pixels [height, width, 3]).

    size: (height, width), or the side of squares. For a picture that cannot be read, the item is (number, reason).
    prepare: `to_rgb` or `images.as_seen`.
    """

    def __init__(
        self,
        pictures: Pictures,
        indices: Sequence[int],
        size: int | tuple[int, int],
        prepare: Callable[[Image.Image], Image.Image] = to_rgb,
        max_pixels: int = MAX_PIXELS,
    ):
        self.pictures, self.indices = pictures, indices
        self.size = (size, size) if isinstance(size, int) else size
        self.prepare, self.max_pixels = prepare, max_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor | str]:
        index = self.indices[position]
        return index, tried(lambda: self.pictures.read(index, self._crop, self.max_pixels))

    def _crop(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(pixels_of(centre_crop(self.prepare(image), *self.size)))


def tried(read: Callable[[], T]) -> T | str:
    """The result of reading a picture, or the reason why it could not be read."""
    try:
        return read()
    except MemoryError:
        return "does not fit in memory"
    except Exception as error:  # for a broken file, Pillow may raise any exception
        return getattr(error, "strerror", None) or str(error) or repr(error)


def collate(items: list[tuple[int, torch.Tensor | str]]) -> Crops:
    """Collates items of a `CropDataset` to a batch of the pictures that could be read."""
    read = [(index, item) for index, item in items if isinstance(item, torch.Tensor)]
    failed = [(index, item) for index, item in items if isinstance(item, str)]
    crops = [item for _, item in read]
    if any(crop.is_floating_point() for crop in crops):
        crops = [crop.float() for crop in crops]
    pixels = torch.stack(crops) if crops else torch.empty(0, dtype=torch.uint8)
    return Crops(pixels, [index for index, _ in read], failed)
