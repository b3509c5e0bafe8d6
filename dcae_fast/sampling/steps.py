"""Steps of fixed-step samplers as functions of tensors only, so that a step can be captured once and replayed."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .arguments import Network

TERMS = 8  # an upper bound of the terms in a step


class Step(NamedTuple):
    """function(network, x, times, numbers, *noise) → the next x. It calls network(x, t) once for each of `times`.

    numbers: coefficients of this step from the schedule, on the device of x and in its dtype. The function does not
    read the values of numbers and times, so steps that differ only in these can share a CUDA graph.
    """

    function: Callable[..., torch.Tensor]
    times: tuple[float, ...]
    numbers: torch.Tensor


Run = Callable[..., torch.Tensor]  # run(network, step, x, *noise)


def run(network: Network, step: Step, x: torch.Tensor, *noise: torch.Tensor) -> torch.Tensor:
    """The next x, computed directly."""
    return step.function(network, x, step.times, step.numbers, *noise)


def linear(
    network: Network, x: torch.Tensor, times: Sequence[float], weights: torch.Tensor, *noise: torch.Tensor
) -> torch.Tensor:
    """A step in which each state is a weighted sum of x, the noise and all earlier outputs of the network.

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
    """Convert updates to steps. Updates are functions (network, x, *noise) → x, linear in x, noise and network outputs.

    Calls each update with unit vectors in float64 to find its times and weights.
    """
    found = [weights_of(update, noises) for update in updates]
    shapes = [weights.shape for _, weights in found]
    numbers = torch.cat([weights.flatten() for _, weights in found]).to(like.device, like.dtype)
    parts = numbers.split([shape.numel() for shape in shapes])
    return [Step(linear, times, part.view(shape)) for (times, _), part, shape in zip(found, parts, shapes, strict=True)]


def weights_of(update: Callable[..., torch.Tensor], noises: int) -> tuple[tuple[float, ...], torch.Tensor]:
    """The times and weights of an update."""
    times, states = [], []
    units = torch.eye(TERMS, dtype=torch.float64)

    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        times.append(t)
        states.append(x)
        return units[noises + len(times)]

    last = update(network, *units[: 1 + noises])
    return tuple(times), torch.stack([*states[1:], last])[:, : 1 + noises + len(times)]
