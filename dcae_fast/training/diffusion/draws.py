"""The times, noise and dropped labels of a step."""

from typing import NamedTuple

import torch

from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.sampling import OBJECTIVES
from dcae_fast.training.engine.batches import generator_of


class Draws(NamedTuple):
    """t: [b], times of the objective. noise: [b, c, h, w]. dropped: [b], which labels become the null class."""

    t: torch.Tensor
    noise: torch.Tensor
    dropped: torch.Tensor


def draw(config: DiffusionConfig, batch: int, part: range, seed: int, step: int, device: torch.device) -> Draws:
    """The draws of a part of the batch of step 0, 1, ..., on the device.

    The whole batch is drawn, so that the draws of an item do not depend on how the batch is divided.
    """
    generator = generator_of(device, seed, step)
    network, objective = config.network, OBJECTIVES[config.train_scheduler]
    shape = (batch, network.in_channels, network.input_size, network.input_size)
    noise = torch.randn(shape, generator=generator, device=device)
    t = objective.draw_time(batch, device, generator)
    dropped = torch.rand(batch, generator=generator, device=device) < network.class_dropout_prob
    mine = slice(part.start, part.stop)
    return Draws(t[mine], noise[mine], dropped[mine])
