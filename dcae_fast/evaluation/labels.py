"""The classes of the samples that are evaluated."""

import torch


def class_labels(samples: int, classes: int, seed: int) -> torch.Tensor:
    """int64 [samples], from a CPU generator of that seed, as the original draws them: as int32, which matters."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (samples,), generator=generator, dtype=torch.int32).long()
