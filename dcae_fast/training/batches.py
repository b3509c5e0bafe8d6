"""Which latents, times, noise and dropped labels a step sees: functions of the seed and the step, on any ranks.

Everything is decided for the whole batch, of which every rank takes its part. So nothing random has to be saved, and a
run goes on with the same batches on another number of ranks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dcae_fast.data.manifest import DataError
from dcae_fast.data.sampler import rank_indices
from dcae_fast.interruption import ignore_interruptions
from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.sampling import OBJECTIVES


class BatchOrder(Sampler[list[int]]):
    """The items of part `rank` of `ranks` of each batch, for the given steps.

    The batch of a step is what the original's sampler gives the `shards` ranks of a run: `batch // shards` items to
    each, one rank after another. With ranks = shards the parts are these; other ranks divide the same batch.
    """

    def __init__(self, items: int, batch: int, shards: int, seed: int, steps: range, rank: int, ranks: int):
        for name, divisor in (("shards", shards), ("ranks", ranks)):
            if batch % divisor:
                raise ValueError(f"batch={batch} is not a multiple of {divisor}, the {name}")
        self.items, self.shards, self.seed, self.steps = items, shards, seed, steps
        self.of_shard = batch // shards
        self.part = range(batch * rank // ranks, batch * (rank + 1) // ranks)
        self.batches = items // shards // self.of_shard
        if self.batches == 0:
            raise ValueError(f"batch={batch}; expected at most {items // shards * shards}, the latents of an epoch")

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        mine = range(self.part.start // self.of_shard, (self.part.stop - 1) // self.of_shard + 1)
        current, orders = None, []
        for step in self.steps:
            epoch, at = divmod(step, self.batches)
            if epoch != current:
                current = epoch
                orders = [rank_indices(self.items, s, self.shards, seed=self.seed, epoch=epoch) for s in mine]
            window = slice(at * self.of_shard, (at + 1) * self.of_shard)
            indices = torch.cat([order[window] for order in orders])
            first = self.part.start - mine.start * self.of_shard
            yield indices[first : first + len(self.part)].tolist()


def load_batches(
    data: Dataset, order: BatchOrder, workers: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (latents [b, c, h, w] float32, labels [b]) on the CPU, in pinned memory for CUDA. Raises DataError."""
    loader = DataLoader(
        data,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interruptions,
    )
    try:
        yield from loader
    except DataError as error:  # of a worker's, the traceback is in the message
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


class Draws(NamedTuple):
    """t: [b], times of the objective; noise: like the latents; dropped: [b], labels that become the null label."""

    t: torch.Tensor
    noise: torch.Tensor
    dropped: torch.Tensor


def draw(config: DiffusionConfig, batch: int, part: range, seed: int, step: int, device: torch.device) -> Draws:
    """Of a part of the batch of a step, on the device; the same whatever the parts. CPU and CUDA differ."""
    generator = torch.Generator(device).manual_seed(_seed_of(seed, step))
    network, objective = config.network, OBJECTIVES[config.train_scheduler]
    shape = (batch, network.in_channels, network.input_size, network.input_size)
    noise = torch.randn(shape, generator=generator, device=device)
    t = objective.draw_time(batch, device, generator)
    dropped = torch.rand(batch, generator=generator, device=device) < network.class_dropout_prob
    mine = slice(part.start, part.stop)
    return Draws(t[mine], noise[mine], dropped[mine])


def _seed_of(*numbers: int) -> int:
    """A seed that differs, as good as certainly, for other numbers; CPU generators use its lower 32 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
