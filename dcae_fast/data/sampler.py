"""The order in which the ranks see a dataset, as in the original implementation."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def rank_indices(
    items: int, rank: int, ranks: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True, drop_last: bool = True
) -> torch.Tensor:
    """The items that a rank sees in an epoch, in order: int64 [items // ranks], or rounded up without drop_last.

    A permutation from a CPU generator seeded `seed + epoch`, or 0, 1, 2, ...; lengthened by its own beginning where
    rounding up needs it; of that each rank takes a consecutive slice.
    """
    each = items // ranks if drop_last else -(-items // ranks)
    order = torch.arange(items)
    if shuffle:
        order = torch.randperm(items, generator=torch.Generator().manual_seed(seed + epoch))
    return order[torch.arange(each * rank, each * (rank + 1)) % max(items, 1)]


class EpochSampler(Sampler[int]):
    """`rank_indices` of one epoch after another: each iteration is an epoch, or the rest of one after `resume`.

    len(sampler) is that of a whole epoch.
    """

    def __init__(
        self, items: int, rank: int = 0, ranks: int = 1, *, seed: int = 0, shuffle: bool = True, drop_last: bool = True
    ):
        if not 0 <= rank < ranks:
            raise ValueError(f"rank={rank}, ranks={ranks}; expected 0 <= rank < ranks")
        self.items, self.rank, self.ranks = items, rank, ranks
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch, self.seen = 0, 0

    def __len__(self) -> int:
        return self.items // self.ranks if self.drop_last else -(-self.items // self.ranks)

    def resume(self, step: int, batch: int) -> None:
        """To where a run is after `step` batches of this rank, each of `batch` items, the last short one dropped.

        The order is exactly that of an uninterrupted run on the same number of ranks; on another number the epoch
        begins anew at the place that `step` and `batch` give.
        """
        batches = len(self) // batch
        if batches == 0:
            raise ValueError(f"batch={batch}; expected at most {len(self)}, the items of a rank in an epoch")
        self.epoch, self.seen = step // batches, step % batches * batch

    def __iter__(self) -> Iterator[int]:
        indices = rank_indices(
            self.items,
            self.rank,
            self.ranks,
            seed=self.seed,
            epoch=self.epoch,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
        )
        seen, self.epoch, self.seen = self.seen, self.epoch + 1, 0
        yield from indices[seen:].tolist()
