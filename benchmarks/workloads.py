"""The workloads of the autoencoders: direction, batch and image size, and their contenders."""

from dataclasses import dataclass
from itertools import product

import torch

F32, SANA = "dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.1"
F64, F128 = "dc-ae-f64c128-in-1.0", "dc-ae-f128c512-in-1.0"
DIRECTIONS = ("encode", "decode")

# Names of `contenders.CONTENDERS`. eager comes first: its error limits the errors of the others.
UNCOMPILED = ("eager", "eager channels-last", "patched channels-last", "patched + CUDA graphs")
COMPILED = (*UNCOMPILED, "torch.compile", "patched, 8 bit")
ALL = (*COMPILED, "patched", "patched + torch.compile", "diffusers patched")
SMALL = (
    *COMPILED, "torch.compile, reduce-overhead", "patched, without graphs", "patched + torch.compile",
    "patched + torch.compile, reduce-overhead", "patched, 8 bit + CUDA graphs",
)  # fmt: skip
BOUNDED = ("eager", "patched", "patched, bounded memory")
FIRST_CALL = ("patched", "torch.compile", "patched + torch.compile")
SHAPES = ("eager channels-last", "patched, without graphs", "patched channels-last", "patched + CUDA graphs")


@dataclass(frozen=True)
class Workload:
    """One direction of one model on `batch` images of size × size pixels."""

    model: str
    direction: str
    batch: int
    size: int
    contenders: tuple[str, ...] = UNCOMPILED

    @property
    def name(self) -> str:
        return f"{self.model}-{self.direction}-b{self.batch}-{self.size}"

    @property
    def max_memory(self) -> int:
        """The memory limit of "patched, bounded memory": 256 bytes per pixel. The unpatched decoder needs about 900."""
        return 256 * self.batch * self.size**2


@dataclass(frozen=True)
class ShapesWorkload:
    """One direction of one model on single images of each of these heights and widths, in pixels."""

    model: str
    direction: str
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    contenders: tuple[str, ...] = SHAPES

    @property
    def name(self) -> str:
        return f"{self.model}-{self.direction}-{len(self.sizes)}-shapes"

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image, in pixels."""
        return list(product(self.heights, self.widths))

    @property
    def largest(self) -> Workload:
        """A square image that contains all others."""
        return Workload(self.model, self.direction, 1, max(*self.heights, *self.widths))


def _both(model: str, batch: int, size: int, contenders: tuple[str, ...]) -> list[Workload]:
    return [Workload(model, direction, batch, size, contenders) for direction in DIRECTIONS]


WORKLOADS: dict[str, list[Workload]] = {  # by part
    "autoencoder": [
        *_both(F32, 1, 512, (*SMALL, "patched", "diffusers patched")),
        *_both(F32, 8, 512, ALL),
        *_both(F32, 1, 1024, UNCOMPILED),
        *_both(F32, 4, 1024, UNCOMPILED),
        *_both(SANA, 1, 1024, SMALL),
        *_both(SANA, 2, 512, SMALL),
        *_both(SANA, 8, 512, COMPILED),
        *_both(F64, 8, 512, COMPILED),
        *_both(F128, 8, 512, COMPILED),
    ],
    "memory": [workload for size in (1024, 2048, 4096, 8192) for workload in _both(F32, 1, size, BOUNDED)],
    "first-call": [Workload(F32, "decode", 8, 512, FIRST_CALL)],
}

REHEARSAL: dict[str, list[Workload]] = {  # for machines without a GPU
    "autoencoder": _both("dc-ae-tiny", 1, 32, UNCOMPILED),
    "memory": _both("dc-ae-tiny", 1, 64, BOUNDED),
    "first-call": [Workload("dc-ae-tiny", "decode", 1, 32, FIRST_CALL[:1])],
}


def workloads(part: str) -> list[Workload]:
    """The workloads of a part of the benchmarks; small ones on a machine without a GPU."""
    return (WORKLOADS if torch.cuda.is_available() else REHEARSAL)[part]


SHAPES_WORKLOADS = [
    ShapesWorkload(F32, direction, (256, 320, 384, 448, 512), (256, 320, 384, 512)) for direction in DIRECTIONS
]
SHAPES_REHEARSAL = [ShapesWorkload("dc-ae-tiny", direction, (32, 64), (32,)) for direction in DIRECTIONS]


def shapes_workloads() -> list[ShapesWorkload]:
    """The workloads of many shapes; small ones on a machine without a GPU."""
    return SHAPES_WORKLOADS if torch.cuda.is_available() else SHAPES_REHEARSAL


def parse(name: str) -> Workload:
    """The workload with this name, for any model and sizes. Raises ValueError."""
    try:
        model, direction, batch, size = name.rsplit("-", 3)
        workload = Workload(model, direction, int(batch.removeprefix("b")), int(size))
    except ValueError:
        workload = None
    if workload is None or workload.name != name or direction not in DIRECTIONS:
        raise ValueError(
            f"workload {name!r}: expected MODEL-DIRECTION-bBATCH-SIZE, where DIRECTION is encode or decode"
        )
    return workload
