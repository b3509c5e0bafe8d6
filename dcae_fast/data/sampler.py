"""The order in which the ranks see a dataset, as in the original implementation."""

import torch


def rank_indices(items: int, rank: int, ranks: int, *, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    """The items that a rank sees in an epoch, in order: int64 [items // ranks].

    Of a permutation from a CPU generator seeded `seed + epoch` each rank takes a consecutive slice.
    """
    each = items // ranks
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed + epoch))
    return order[each * rank : each * (rank + 1)]
