"""The order of the data: the original's, and the same on any number of ranks."""

import numpy as np
import pytest
import torch

from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.sampler import rank_indices
from dcae_fast.errors import DataError
from dcae_fast.training.engine.batches import BatchOrder, load_batches

ITEMS, BATCH = 50, 12


def whole_batches(shards: int, ranks: int, steps: range) -> list[list[int]]:
    """The parts of all ranks, one after another, by step."""
    parts = [BatchOrder(ITEMS, BATCH, shards, 3, steps, rank, ranks) for rank in range(ranks)]
    return [sum(batch, start=[]) for batch in zip(*parts, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_original_order(ranks):
    each = BATCH // ranks
    for rank in range(ranks):
        expected = []
        for number in range(3):
            epoch = rank_indices(ITEMS, rank, ranks, seed=3, epoch=number).tolist()
            expected += [epoch[start : start + each] for start in range(0, len(epoch) - each + 1, each)]
        assert len(expected) > 2 * (ITEMS // BATCH)
        assert list(BatchOrder(ITEMS, BATCH, ranks, 3, range(1, len(expected)), rank, ranks)) == expected[1:]


@pytest.mark.parametrize("shards", [1, 3, 4])
def test_other_ranks_share_the_same_batches(shards):
    expected = whole_batches(shards, shards, range(11))
    for ranks in (1, 2, 3, 4, 6, 12):
        assert whole_batches(shards, ranks, range(11)) == expected
        assert whole_batches(shards, ranks, range(5, 11)) == expected[5:]
    epoch = sum(expected[: ITEMS // shards // (BATCH // shards)], start=[])
    assert len(set(epoch)) == len(epoch)


@pytest.mark.parametrize(
    "items, batch, shards, ranks, words",
    [
        (50, 12, 5, 1, "5, the number of shards"),
        (50, 12, 1, 5, "5, the number of ranks"),
        (50, 60, 1, 1, "at most 50"),
    ],
)
def test_batches_that_cannot_be(items, batch, shards, ranks, words):
    with pytest.raises(ValueError, match=words):
        BatchOrder(items, batch, shards, 0, range(1), 0, ranks)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_latent_is_named_in_one_line(tmp_path, workers):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.full((4, 2, 2), np.nan if number == 2 else 0, np.float32))
    order = BatchOrder(4, 2, 1, 0, range(2), 0, 1)
    with pytest.raises(DataError) as caught:
        list(load_batches(LatentDataset(tmp_path), order, workers, torch.device("cpu")))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/2.npy: contains NaN or infinity") and "\n" not in message
