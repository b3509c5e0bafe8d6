"""Batches of pictures for evaluation, from a folder or an .npz file, independent of the number of ranks."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dcae_fast import distributed
from dcae_fast.data.pictures import CropDataset, Crops, Pictures, collate
from dcae_fast.errors import DataError
from dcae_fast.files import check_regular
from dcae_fast.images import MAX_PIXELS
from dcae_fast.interruption import ignore_interruptions


def share_of_batches(count: int, batch: int) -> range:
    """The numbers of this rank's pictures, of `count` in total: consecutive whole batches; the very last may be short.

    A batch has the same pictures, and hence the same network outputs, for any number of ranks.
    """
    units = distributed.share(-(-count // batch))
    return range(units.start * batch, min(units.stop * batch, count))


class FolderBatches:
    """This rank's batches of centre crops of a folder's pictures.

    failed: (name, reason) of the pictures that could not be read or have more than `max_pixels` pixels.
    """

    def __init__(self, pictures: Pictures, resolution: int, batch: int, workers: int, max_pixels: int = MAX_PIXELS):
        self.pictures, self.resolution, self.batch, self.workers = pictures, resolution, batch, workers
        self.max_pixels = max_pixels
        self.count, self.failed = len(pictures.items), list(pictures.failed) if distributed.is_main() else []

    def __iter__(self) -> Iterator[Crops]:
        dataset = self.crops(share_of_batches(self.count, self.batch))
        workers = min(self.workers, -(-len(dataset) // self.batch))
        options = {"collate_fn": collate, "pin_memory": torch.cuda.is_available()}
        options |= {"num_workers": workers, "worker_init_fn": ignore_interruptions}
        for crops in DataLoader(dataset, self.batch, **options):
            self.failed += [(self.pictures.items[index].name, reason) for index, reason in crops.failed]
            if crops.indices:
                yield crops

    def crops(self, indices: range | list[int]) -> CropDataset:
        return CropDataset(self.pictures, indices, self.resolution, max_pixels=self.max_pixels)


class NpzBatches:
    """This rank's batches of the pictures arr_0, uint8 [N, H, W, 3], of an .npz file, such as ADM's reference batches.

    The file is read batch by batch and may be compressed. Raises DataError.
    """

    def __init__(self, path: Path, batch: int):
        self.path, self.batch, self.failed = path, batch, []
        with _pictures_array(path) as (_, shape):
            self.count = shape[0]

    def __iter__(self) -> Iterator[Crops]:
        mine = share_of_batches(self.count, self.batch)
        with _pictures_array(self.path) as (file, shape):
            row = int(np.prod(shape[1:]))
            file.seek(mine.start * row, 1)
            for start in range(mine.start, mine.stop, self.batch):
                stop = min(start + self.batch, mine.stop)
                content = self._read(file, (stop - start) * row)
                pixels = torch.frombuffer(content, dtype=torch.uint8).view(stop - start, *shape[1:])
                yield Crops(pixels, list(range(start, stop)), [])

    def _read(self, file: IO[bytes], size: int) -> bytearray:
        try:
            content = bytearray(file.read(size))
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.path}: {error}") from error
        if len(content) != size:
            raise DataError(f"{self.path}: is truncated; arr_0 lacks data of {self.count} pictures")
        return content


@contextmanager
def _pictures_array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Opens arr_0.npy in an .npz file; yields the file, positioned after the header, and the shape [N, H, W, 3]."""
    try:
        check_regular(path)
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # for a broken file, numpy and zipfile may raise any exception
        raise DataError(f"{path}: expected an .npz file with pictures arr_0: {error}") from error
    with archive, file:
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise DataError(f"{path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3)")
        yield file, shape


def channels_first(pixels: torch.Tensor) -> torch.Tensor:
    """[n, h, w, 3] → a view [n, 3, h, w] in channels-last memory format."""
    return pixels.permute(0, 3, 1, 2)


def progress(batches: Iterable[Crops]) -> Iterator[Crops]:
    """Iterates over the batches; the main process shows a progress bar of its pictures."""
    with tqdm(unit="image", disable=None if distributed.is_main() else True) as bar:
        for crops in batches:
            yield crops
            bar.update(len(crops.indices))
