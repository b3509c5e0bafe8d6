"""Tiles of Triton kernels as candidates of `_plans`."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TilePlan:
    tile: tuple
    workspace_size: int = 0


class TileCandidates:
    """The candidates for `_plans.find`. run: computes something small with a tile, which compiles the kernel.

    Several threads build candidates at the same time, so that most of the compilation runs in parallel.
    """

    def __init__(self, tiles: Sequence[tuple], run: Callable[[tuple], object], device: torch.device):
        self._tiles, self._run, self._device = tiles, run, device

    def __len__(self) -> int:
        return len(self._tiles)

    def build(self, place: int) -> TilePlan:
        with torch.cuda.device(self._device):
            self._run(self._tiles[place])
        return TilePlan(self._tiles[place])


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU; 1 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
