"""The classes of the evaluated samples."""

import torch


def class_labels(samples: int, classes: int, seed: int) -> torch.Tensor:
    """Random classes, int64 [samples], from a CPU generator with this seed. Drawn as int32, as in DC-Gen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, classes, (samples,), generator=generator, dtype=torch.int32).long()
