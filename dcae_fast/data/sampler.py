"""The order in which each rank sees a dataset, as in DC-Gen."""

import torch


def rank_indices(items: int, rank: int, ranks: int, *, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    """The items that a rank sees in an epoch, in order: int64 [items // ranks].

    Each rank takes a consecutive slice of a permutation drawn from a CPU generator with the seed `seed + epoch`.
    """
    each = items // ranks
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed + epoch))
    return order[each * rank : each * (rank + 1)]
