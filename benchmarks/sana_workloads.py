"""The workloads of diffusers' SANA, and their contenders."""

from dataclasses import dataclass

import torch

BY_BLOCK, REDUCED = "torch.compile, by block", "torch.compile, reduce-overhead"
GRAPHS, FROZEN = "patched + CUDA graphs", "patched, frozen + CUDA graphs"
FP8, INT8 = "patched, fp8", "patched, int8"  # and frozen


@dataclass(frozen=True)
class SanaWorkload:
    """work: "forward", "training" (one step, activation checkpointing of every block) or "pipeline" (to a picture).

    size: of a picture, in pixels; the latents are 32 times smaller.
    """

    network: str
    work: str
    batch: int
    size: int
    contenders: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"sana-{self.network}-{self.work}-b{self.batch}-{self.size}px"


SANA_WORKLOADS = [
    SanaWorkload("1600m", "forward", 2, 1024, ("eager", BY_BLOCK, REDUCED, "patched", GRAPHS, FROZEN, FP8, INT8)),
    SanaWorkload("1600m", "forward", 8, 1024, ("eager", BY_BLOCK, "patched", FROZEN, FP8, INT8)),
    SanaWorkload("1600m", "forward", 2, 4096, ("eager", BY_BLOCK, "patched", FROZEN, FP8, INT8)),
    SanaWorkload("1600m", "training", 8, 1024, ("eager", BY_BLOCK, "patched", "patched + torch.compile")),
    SanaWorkload("1600m", "pipeline", 1, 1024, ("eager", BY_BLOCK, "patched", GRAPHS, FROZEN)),
]
SANA_REHEARSAL = [SanaWorkload("tiny", work, 2 - (work == "pipeline"), 64, ("eager", "patched")) for work in (
    "forward", "training", "pipeline"
)]  # fmt: skip


def sana_workloads() -> list[SanaWorkload]:
    """The workloads; small ones on a machine without a GPU."""
    return SANA_WORKLOADS if torch.cuda.is_available() else SANA_REHEARSAL
