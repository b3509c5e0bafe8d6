"""A step of a fixed-step sampler as a function of tensors alone, which can be captured once and replayed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .arguments import Network

TERMS = 8  # more than a step of any sampler has


class Step(NamedTuple):
    """function(network, x, times, numbers, *noise) → the next x, for network(x, t) called at each of `times` in turn.

    numbers: what the schedule says of this step, on the device of x and in its dtype. The function reads the value of
    none of them, nor of times, so that steps which differ in these alone may share a CUDA graph.
    """

    function: Callable[..., torch.Tensor]
    times: tuple[float, ...]
    numbers: torch.Tensor


Run = Callable[..., torch.Tensor]  # run(network, step, x, *noise)


def run(network: Network, step: Step, x: torch.Tensor, *noise: torch.Tensor) -> torch.Tensor:
    """The next x, computed as written."""
    return step.function(network, x, step.times, step.numbers, *noise)


def linear(
    network: Network, x: torch.Tensor, times: Sequence[float], weights: torch.Tensor, *noise: torch.Tensor
) -> torch.Tensor:
    """A step whose every state is a weighted sum of x, the noise and the network's outputs before it.

        x_k = Σ_j weights[k - 1, j] terms_j,    terms = [x, *noise, network(x_0, t_0), ..., network(x_{k-1}, t_{k-1})]

    weights: [K, K + 1 + len(noise)] for K calls of the network; returns x_K.
    """
    terms, state = [x, *noise], x
    for t, row in zip(times, weights, strict=True):
        terms.append(network(state, t))
        first, *rest = (weight * term for weight, term in zip(row, terms, strict=False))
        state = sum(rest, first)
    return state


def linear_steps(updates: Sequence[Callable[..., torch.Tensor]], like: torch.Tensor, noises: int = 0) -> list[Step]:
    """Steps from updates: functions (network, x, *noise) → x that are linear in x, noise and the network's outputs.

    Their times and weights are found by calling them with unit vectors, in float64.
    """
    found = [weights_of(update, noises) for update in updates]
    shapes = [weights.shape for _, weights in found]
    numbers = torch.cat([weights.flatten() for _, weights in found]).to(like.device, like.dtype)
    parts = numbers.split([shape.numel() for shape in shapes])
    return [Step(linear, times, part.view(shape)) for (times, _), part, shape in zip(found, parts, shapes, strict=True)]


def weights_of(update: Callable[..., torch.Tensor], noises: int) -> tuple[tuple[float, ...], torch.Tensor]:
    """The times and weights of the step that an update is."""
    times, states = [], []
    units = torch.eye(TERMS, dtype=torch.float64)

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        states.append(x)
        return units[noises + len(times)]

    last = update(network, *units[: 1 + noises])
    return tuple(times), torch.stack([*states[1:], last])[:, : 1 + noises + len(times)]
