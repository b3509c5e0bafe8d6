"""Chooses the parts of a batch that fit into the memory."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile

import torch

from .bands import Bands, Plan, coarsest, halos
from .layers import Layer

MAX_ELEMENTS = 2**31 - 1  # of a tensor; beyond that the libraries' convolutions are slow or missing
MOST_BANDS = 64  # more bands save almost no memory


def free_memory(device: torch.device) -> int:
    """Bytes that PyTorch can still allocate on a GPU: free memory, and unused memory of its allocator if known."""
    free, _ = torch.cuda.mem_get_info(device)
    try:
        stats = torch.cuda.memory_stats_as_nested_dict(device)
    except RuntimeError:  # another allocator (CUDAPluggableAllocator, RMM)
        return free
    return free + stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"]


def plan(layers: Sequence[Layer], shape: torch.Size, itemsize: int, memory: float) -> Plan | None:
    """How to run the layers on an input [B, C, H, W] within `memory` bytes; None: everything at once.

    A layer takes peak * H * W * itemsize bytes for an image; the coder's own forward also keeps the input of a stage.
    If all layers fit for one image or more, they run on that many images. Else they run on one image, and the layers
    that do not fit run in bands.
    """
    for size in shape[2:]:
        for layer in layers:
            if size % layer.down:
                return None
            size = size * layer.up // layer.down
    return Planner(layers, shape, itemsize, memory).plan(shape[0])


class Planner:
    """Plans for one image. needs[k]: bytes that layer k takes; tensors[k]: bytes of its input."""

    def __init__(self, layers: Sequence[Layer], shape: torch.Size, itemsize: int, memory: float):
        self.layers, self.sizes = layers, [tuple(shape[2:])]
        for layer in layers:
            self.sizes.append(tuple(size * layer.up // layer.down for size in self.sizes[-1]))
        *inputs, _ = positions = list(map(math.prod, self.sizes))
        self.needs = [layer.peak * n * itemsize for layer, n in zip(layers, inputs, strict=True)]
        self.widest = [layer.widest * n for layer, n in zip(layers, inputs, strict=True)]
        outputs = zip(layers, positions[1:], strict=True)
        self.tensors = [0, *(layer.channels * n * itemsize for layer, n in outputs)]  # the caller holds the first one
        self.total = memory
        self.memory = memory - self.tensors[-1] * shape[0]  # without the result for all images

    def plan(self, images: int) -> Plan | None:
        if (max(self.needs) + max(self.tensors)) * images <= self.total and max(self.widest) * images <= MAX_ELEMENTS:
            return None
        fitting = int(min(self.memory // max(self.needs), MAX_ELEMENTS // max(self.widest)))
        if fitting >= 1:
            return Plan(math.ceil(images / math.ceil(images / fitting)), [layer.run for layer in self.layers])
        steps, done = [], 0
        for start, stop, bands in self._segments():
            steps += [*(layer.run for layer in self.layers[done:start]), bands]
            done = stop
        return Plan(1, [*steps, *(layer.run for layer in self.layers[done:])])

    def _segments(self) -> Iterator[tuple[int, int, Bands]]:
        """Which neighbouring layers to compute in bands: too large ones, extended to small tensors around them."""
        count, done = len(self.layers), 0
        local = [layer.before is not None for layer in self.layers]
        large = [local[k] and (self.needs[k] > self.memory or self.widest[k] > MAX_ELEMENTS) for k in range(count)]
        small = [local[k] and not large[k] for k in range(count)]
        for is_large, group in groupby(range(count), large.__getitem__):
            if is_large:
                first, *_, last = [*group] * 2
                before = takewhile(small.__getitem__, range(first - 1, done - 1, -1))
                behind = takewhile(small.__getitem__, range(last + 1, count))
                starts = self._smaller([first, *before])
                stops = self._smaller([last + 1, *(k + 1 for k in behind)])
                choices = [(*self._bands(start, stop), start, stop) for start in starts for stop in stops]
                _, _, bands, start, stop = min(choices, key=lambda choice: choice[:2])
                if bands is not None:
                    yield start, stop, bands
                    done = stop

    def _smaller(self, indices: Iterable[int]) -> list[int]:
        """The first index, and each index whose tensor is smaller than all tensors before it."""
        smallest, found = math.inf, []
        for k in indices:
            if self.tensors[k] < smallest:
                smallest = self.tensors[k]
                found.append(k)
        return found

    def _bands(self, start: int, stop: int) -> tuple[float, float, Bands | None]:
        """Missing bytes, bytes that are computed twice, and the largest bands of these layers that fit.

        A band has at least four times the rows of a halo, so that at most half of the work is done twice. There are at
        most about MOST_BANDS bands. The bands are None, and infinitely many bytes missing, if the image is smaller.
        """
        layers, needed = self.layers[start:stop], halos(self.layers[start:stop])
        rows, halo = self.sizes[start][0] // coarsest(layers), needed[0]
        smallest = max(4 * halo, math.ceil(rows / MOST_BANDS))
        if smallest >= rows:
            return math.inf, 0.0, None
        free = self.memory - self.tensors[start] - self.tensors[stop]
        size, cut, missing, twice = rows - 1, 0, 0.0, 0.0
        for k, layer in enumerate(layers, start):
            size = min(size, int(rows * min(free / self.needs[k], MAX_ELEMENTS / self.widest[k])) + cut)
            missing = max(missing, self.needs[k] * (smallest - cut) / rows - free)
            twice += self.needs[k] * 2 * (halo - cut) / rows
            if layer.up != layer.down:
                cut = halo - needed[k - start]
        missing, size = (0.0, size) if size >= smallest else (missing, smallest)
        count = math.ceil((rows - 2 * halo) / (size - 2 * halo))
        size = math.ceil((rows + 2 * halo * (count - 1)) / count)
        return missing, twice * (count - 1), Bands(layers, size, needed)
