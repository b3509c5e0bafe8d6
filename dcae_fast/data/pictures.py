"""Pictures on disk: in class folders, in one folder, or in WebDataset's tar shards; cropped as the original does."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dcae_fast.images import centre_crop, wide_grey

from .latents import files_under
from .manifest import DataError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Picture(NamedTuple):
    """name: path from the root, through a shard if in one; key: the same for its latent, without the suffix.

    label: class number; shard, offset, size: where its bytes are in which tar file, "" for a file of its own.
    """

    name: str
    key: str
    label: int = 0
    shard: str = ""
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Pictures:
    """Pictures under a folder, in the order of their latents' files. classes: names by number, or empty."""

    root: Path
    items: list[Picture]
    classes: tuple[str, ...]

    def open(self, picture: Picture) -> Image.Image:
        if not picture.shard:
            return Image.open(self.root / picture.name)
        with open(self.root / picture.shard, "rb") as file:
            file.seek(picture.offset)
            return Image.open(io.BytesIO(file.read(picture.size)))


def find_pictures(source: Path) -> Pictures:
    """The pictures in a folder and below, in a folder of tar shards, or in one shard.

    The first folder on the way to a file names its class, numbered in the order of names; a folder of pictures alone
    has no classes. In shards a member `x.cls` has the class number of the picture `x.<suffix>`. Raises DataError.
    """
    if source.is_file() and source.suffix == ".tar":
        root, shards = source.parent, [source.name]
    elif source.is_dir():
        root, shards = source, sorted(files_under(source, {".tar"}))
    else:
        raise DataError(f"{source}: no such folder, nor a .tar file")
    loose = next(files_under(source, SUFFIXES), None) if shards and source.is_dir() else None
    if loose is not None:
        raise DataError(f"{source / loose}: beside shards; expected pictures in .tar files, or no such files")
    pictures = _in_shards(root, shards) if shards else _in_folders(root)
    if not pictures.items:
        raise DataError(f"{source}: no pictures here; looked for {' '.join(sorted(SUFFIXES))} and .tar")
    pictures.items.sort(key=lambda picture: f"{picture.key}.npy".split("/"))
    for one, other in zip(pictures.items, pictures.items[1:], strict=False):
        if one.key == other.key:
            raise DataError(f"{one.name} and {other.name} would both have the latent {one.key}")
    return pictures


def _in_folders(root: Path) -> Pictures:
    names = list(files_under(root, SUFFIXES))
    classes = tuple(sorted({name.split("/")[0] for name in names if "/" in name}))
    numbers = {name: number for number, name in enumerate(classes)}
    strays = sorted(name for name in names if classes and "/" not in name)
    if strays:
        raise DataError(f"{root / strays[0]}: beside class folders; expected pictures in folders, or no folders")
    items = [Picture(name, name.rpartition(".")[0], numbers.get(name.split("/")[0], 0)) for name in names]
    return Pictures(root, items, classes)


def _in_shards(root: Path, shards: Sequence[str]) -> Pictures:
    found, labels = [], {}
    for shard in shards:
        try:
            with tarfile.open(root / shard, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    key, suffix = _sample(shard, member.name)
                    if suffix == ".cls":
                        labels[key] = int(tar.extractfile(member).read())
                    elif suffix in SUFFIXES:
                        name = f"{shard}/{member.name}"
                        found.append(Picture(name, key, 0, shard, member.offset_data, member.size))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"{root / shard}: not a readable shard: {error}") from error
    return Pictures(root, found, ()) if not labels else _labelled(root, found, labels)


def _sample(shard: str, member: str) -> tuple[str, str]:
    """The sample that a member belongs to, its path up to the first dot of the last part, and the member's suffix."""
    if ".." in member.split("/"):
        raise ValueError(f"{member} leaves its folder")
    folder, slash, file = member.removeprefix("./").rpartition("/")
    sample = f"{shard.removesuffix('.tar')}/{folder}{slash}{file.partition('.')[0]}"
    return sample, PurePosixPath(file).suffix.lower()


def _labelled(root: Path, found: Sequence[Picture], labels: dict[str, int]) -> Pictures:
    """The pictures under class folders, named by numbers of one width."""
    for picture in found:
        if labels.get(picture.key, -1) < 0:
            raise DataError(f"{root / picture.name}: no class number beside it, as others have")
    most = max(labels.values())
    classes = tuple(f"{number:0{len(str(most))}d}" for number in range(most + 1))
    numbers = [labels[picture.key] for picture in found]
    items = [p._replace(key=f"{classes[n]}/{p.key}", label=n) for p, n in zip(found, numbers, strict=True)]
    return Pictures(root, items, classes)


def to_rgb(image: Image.Image) -> Image.Image:
    """As torchvision has it, and so the original: not turned as the camera says, and without transparency.

    But grey of 16 bits, of which that would leave white, is brought to 8. ValueError for floating point.
    """
    grey = wide_grey(image)
    if grey is not None:
        image = Image.fromarray((255 * grey).round().astype(np.uint8))
    return image.convert("RGB")


class Crops(NamedTuple):
    """A batch: pixels uint8 [n, side, side, 3] of the pictures numbered `indices`; failed: (number, reason)."""

    pixels: torch.Tensor
    indices: list[int]
    failed: list[tuple[int, str]]


class CropDataset(Dataset):
    """Some of the pictures, RGB, cropped to the centre: items are (number, uint8 [resolution, resolution, 3]).

    Of a picture that cannot be read an item is (number, reason).
    """

    def __init__(self, pictures: Pictures, indices: Sequence[int], resolution: int):
        self.pictures, self.indices, self.resolution = pictures, indices, resolution

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor | str]:
        index = self.indices[position]
        try:
            with self.pictures.open(self.pictures.items[index]) as image:
                crop = centre_crop(to_rgb(image), self.resolution, self.resolution)
        except Exception as error:  # Pillow raises anything for a broken file
            return index, str(error) or repr(error)
        return index, torch.from_numpy(np.array(crop))


def collate(items: list[tuple[int, torch.Tensor | str]]) -> Crops:
    """The items of a `CropDataset` as a batch of those that could be read."""
    read = [(index, item) for index, item in items if isinstance(item, torch.Tensor)]
    failed = [(index, item) for index, item in items if isinstance(item, str)]
    pixels = torch.stack([item for _, item in read]) if read else torch.empty(0, dtype=torch.uint8)
    return Crops(pixels, [index for index, _ in read], failed)
