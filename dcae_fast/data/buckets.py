"""Aspect-ratio buckets: sizes of about as many pixels as a square, and the bucket of each picture."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset

from dcae_fast import distributed
from dcae_fast.images import MAX_PIXELS, as_seen
from dcae_fast.interruption import ignore_interruptions

from .manifest import Settings
from .pictures import Pictures, tried

MAX_ASPECT = 4.0  # of the longer side to the shorter
MAX_DEVIATION = 0.1  # of a bucket's pixels from the square's
ROTATED = (5, 6, 7, 8)  # EXIF orientations that exchange the sides
SIZE_BEFORE_ROTATION = {"JPEG", "MPO", "PNG", "WEBP"}  # formats whose header gives the size and the EXIF data


class Bucket(NamedTuple):
    """The size of crops, in pixels. Its name, width x height, is the name of its folder of latents."""

    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"


@cache
def bucket_sizes(resolution: int, ratio: int) -> tuple[Bucket, ...]:
    """The buckets near resolution² pixels, sorted: all sides are multiples of `ratio`.

    For each length of the shorter side, the longer side for which the pixels are nearest to resolution², if the sides'
    ratio is at most `MAX_ASPECT` and the pixels differ by at most `MAX_DEVIATION`. The latents of existing folders
    depend on this rule: it must not change.
    """
    side = resolution // ratio
    pairs = [(short, round(side * side / short)) for short in range(1, side + 1)]
    fitting = {
        Bucket(height * ratio, width * ratio)
        for short, long in pairs
        if long <= MAX_ASPECT * short and abs(short * long - side * side) <= MAX_DEVIATION * side * side
        for height, width in ((short, long), (long, short))
    }
    return tuple(sorted(fitting))


def buckets_of(settings: Settings) -> tuple[Bucket, ...]:
    """The buckets of a folder with these settings; empty if it has none."""
    return bucket_sizes(settings.resolution, settings.resolution // settings.shape[1]) if settings.buckets else ()


def settings_of_bucket(settings: Settings, bucket: Bucket) -> Settings:
    """The settings of a bucket's own folder, which contains latents of one shape."""
    channels, side, _ = settings.shape
    ratio = settings.resolution // side
    return replace(settings, buckets=False, shape=(channels, bucket.height // ratio, bucket.width // ratio))


def nearest(buckets: Sequence[Bucket], height: int, width: int) -> Bucket:
    """The bucket whose ratio of sides is nearest, by the logarithm; of equally near ones the first."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket.height * width / (bucket.width * height))))


def in_buckets(
    pictures: Pictures, buckets: Sequence[Bucket], as_original: bool, max_pixels: int, workers: int
) -> dict[Bucket, Pictures]:
    """The pictures of each bucket, also of empty ones. The ranks share the work, and all return the same.

    Reads the size of each picture, mostly from its header. Pictures whose size cannot be read are added to
    `pictures.failed`. as_original: sizes are not rotated by EXIF data.
    """
    dataset = _Sizes(pictures, distributed.share(len(pictures.items)), as_original, max_pixels)
    workers = min(workers, -(-len(dataset) // 256))
    loader = DataLoader(dataset, 256, collate_fn=list, num_workers=workers, worker_init_fn=ignore_interruptions)
    mine = [size for batch in loader for size in batch]
    found = {bucket: Pictures(pictures.root, [], pictures.classes) for bucket in buckets}
    sizes = [size for part in distributed.all_gather(mine) for size in part]
    for picture, size in zip(pictures.items, sizes, strict=True):
        if isinstance(size, str):
            pictures.failed.append((picture.name, size))
        else:
            found[nearest(buckets, *size)].items.append(picture)
    return found


class _Sizes(Dataset):
    """Items (height, width) of the pictures numbered `indices` as they are seen; a reason if one cannot be read."""

    def __init__(self, pictures: Pictures, indices: Sequence[int], as_original: bool, max_pixels: int = MAX_PIXELS):
        self.pictures, self.indices, self.as_original, self.max_pixels = pictures, indices, as_original, max_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, int] | str:
        return tried(lambda: self.pictures.read(self.indices[position], self._size, self.max_pixels))

    def _size(self, image: Image.Image) -> tuple[int, int]:
        if not self.as_original:
            if image.format not in SIZE_BEFORE_ROTATION:
                image = as_seen(image)
            # Image's own method: that of PNG files would decode the picture
            elif Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in ROTATED:
                return image.width, image.height
        return image.height, image.width
