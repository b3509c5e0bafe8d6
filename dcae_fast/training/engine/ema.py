"""The exponential moving average of a network's weights, which gives better samples than the weights themselves."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

WARMUP_STEPS = 2000


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MovingAverage:
    """The average of each parameter, by its name, in the parameter's dtype and sharded like the parameter.

    average ← average + (1 - d_k) (weights - average) after step k = 1, 2, ...,  d_k = decay (1 - exp(-k / 2000))
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = self.decay * (1 - math.exp(-step / WARMUP_STEPS))
        averages = [local(average) for average in self.average.values()]
        get_ema_multi_avg_fn(decay)(averages, [local(p.detach()) for p in network.parameters()], step)

    @contextmanager
    def in_place_of_weights(self, network: nn.Module) -> Iterator[None]:
        """Within the block the network's weights are the average; afterwards they are as before, to the bit."""
        self._swap(network)
        try:
            yield
        finally:
            self._swap(network)

    @torch.no_grad()
    def _swap(self, network: nn.Module) -> None:
        for average, parameter in zip(self.average.values(), network.parameters(), strict=True):
            mine, theirs = local(average), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)

    @torch.no_grad()
    def load(self, file: Path, prefix: str) -> None:
        """Reads the average of each parameter NAME, whole, as prefix + NAME from a safetensors file.

        The file may have been written by another number of ranks.
        """
        with safe_open(file, framework="pt") as tensors:
            for name, average in self.average.items():
                whole = tensors.get_tensor(prefix + name)
                if isinstance(average, DTensor):  # every rank takes its part from the file, nothing is sent
                    place = average.device_mesh, average.placements
                    whole = distribute_tensor(whole.to(average.device), *place, src_data_rank=None)
                local(average).copy_(local(whole))
