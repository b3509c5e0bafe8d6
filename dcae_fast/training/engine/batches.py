"""Which items a step sees, and its random numbers: functions of the seed and the step, on any number of ranks.

Everything is decided for the whole batch, of which every rank takes a part. So no random state is saved, and a run
resumes with the same batches on another number of ranks.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dcae_fast.data.sampler import rank_indices
from dcae_fast.errors import DataError
from dcae_fast.interruption import ignore_interruptions


class BatchOrder(Sampler[list[int]]):
    """For each of the given steps, the indices of the items in part `rank` of `ranks` of the batch.

    The batch of a step is the one that the original's sampler gives to a run of `shards` ranks: `batch // shards` items
    for each, one rank after another. Another number of ranks divides the same batch.
    """

    def __init__(self, items: int, batch: int, shards: int, seed: int, steps: range, rank: int, ranks: int):
        for name, divisor in (("shards", shards), ("ranks", ranks)):
            if batch % divisor:
                raise ValueError(f"batch={batch}; expected a multiple of {divisor}, the number of {name}")
        self.items, self.shards, self.seed, self.steps = items, shards, seed, steps
        self.of_shard = batch // shards
        self.part = range(batch * rank // ranks, batch * (rank + 1) // ranks)
        self.batches = items // shards // self.of_shard
        if self.batches == 0:
            raise ValueError(f"batch={batch}; expected at most {items // shards * shards}, the items of an epoch")

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


def load_batches(data: Dataset, order: BatchOrder, workers: int, device: torch.device) -> Iterator[Any]:
    """Batches of the items of `data`, collated, on the CPU; in pinned memory for CUDA. Raises DataError."""
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
    except DataError as error:  # a worker's error has its traceback in the message
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None


def generator_of(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The generator of all random numbers of a step. Its numbers on the CPU and on CUDA differ.

    Its seed is a hash, practically certain to differ for another seed or step; CPU generators use its lower 32 bits.
    """
    hashed = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.Generator(device).manual_seed(int(hashed))
