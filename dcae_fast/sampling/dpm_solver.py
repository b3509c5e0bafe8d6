"""DPM-Solver++ (arXiv 2211.01095) on the noise schedule of latent diffusion, for networks that predict the noise.

    x_t = α_t z + σ_t ε,    σ_t = √(1 - α_t²),    λ_t = ln(α_t / σ_t),    t in [0.001, 1], network time 1000 t

As in the original: steps of third order ("fast single-step"), uniform in time, ending at t = 0.001.
"""

import math
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch

from . import steps as stepping
from .arguments import Network, check


def betas() -> torch.Tensor:
    """β_n for n = 1 ... 1000, float64: linspace(√0.00085, √0.012)²."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()


def log_alpha(t: torch.Tensor) -> torch.Tensor:
    """ln α(t), float64: ½ Σ_{i<=n} ln(1 - β_i) at the knots t = n / 1000, linear between the knots."""
    table = torch.log1p(-betas()).cumsum(0) / 2
    position = 1000 * t.double() - 1
    left = position.floor().clamp(0, 998).long()
    return torch.lerp(table[left], table[left + 1], position - left)


def orders(steps: int) -> list[int]:
    """The orders of the updates. Their sum is `steps`; all are 3 but the last one or two, and the last is 1 or 2."""
    if steps % 3 == 0:
        return [3] * (steps // 3 - 1) + [2, 1]
    return [3] * (steps // 3) + [steps % 3]


class Grid(NamedTuple):
    """Times from 1 to 0.001 and the schedule at each: lists of steps + 1 floats."""

    t: list[float]
    alpha: list[float]
    sigma: list[float]
    lam: list[float]


def grid(steps: int) -> Grid:
    t = torch.linspace(1, 0.001, steps + 1, dtype=torch.float64)
    log_alphas = log_alpha(t)
    sigmas = (-torch.expm1(2 * log_alphas)).sqrt()
    return Grid(*(table.tolist() for table in (t, log_alphas.exp(), sigmas, log_alphas - sigmas.log())))


@torch.no_grad()
def sample(
    network: Network,
    noise: torch.Tensor,
    steps: int = 30,
    generator: torch.Generator | None = None,
    run: stepping.Run = stepping.run,
) -> torch.Tensor:
    """Sample in `steps` calls of a network that predicts ε. Deterministic: `generator` is not used."""
    check(noise, steps, least=1)
    points, x = grid(steps), noise
    ends = accumulate(orders(steps))
    updates = [partial(update, points=points, i=end - k, order=k) for k, end in zip(orders(steps), ends, strict=True)]
    for step in stepping.linear_steps(updates, noise):
        x = run(network, step, x)
    return x


def update(network: Network, x: torch.Tensor, points: Grid, i: int, order: int) -> torch.Tensor:
    """x at grid point i + order from x at grid point s = i. The points between them are the inner points.

    D_k = (x_k - σ_k ε̂(x_k)) / α_k is the predicted latent, h_k = λ_k - λ_s, φ_k = exp(-h_k) - 1. The indices 1, 2, e
    mean i + 1, i + 2 and the end i + order:

        E_k = σ_k/σ_s x - α_k φ_k D_s                                the update of order 1
        order 2: x_1 = E_1,  x = E_e - α_e φ_e h_e/(2 h_1) (D_1 - D_s)
        order 3: x_1 = E_1,  x_2 = E_2 + α_2 h_2/h_1 (φ_2/h_2 + 1) (D_1 - D_s),
                 x = E_e + α_e h_e/h_2 (φ_e/h_e + 1) (D_2 - D_s)
    """
    t, alpha, sigma, lam = points
    h = [lam[k] - lam[i] for k in range(i, i + order + 1)]
    phi = [math.expm1(-step) for step in h]

    def predict(x: torch.Tensor, k: int) -> torch.Tensor:
        return (x - sigma[i + k] * network(x, 1000 * t[i + k])) / alpha[i + k]

    start = predict(x, 0)

    def euler(k: int) -> torch.Tensor:
        return sigma[i + k] / sigma[i] * x - alpha[i + k] * phi[k] * start

    if order == 1:
        return euler(1)
    first = predict(euler(1), 1) - start
    if order == 2:
        return euler(2) - alpha[i + 2] * phi[2] * h[2] / (2 * h[1]) * first
    second = predict(euler(2) + alpha[i + 2] * h[2] / h[1] * (phi[2] / h[2] + 1) * first, 2) - start
    return euler(3) + alpha[i + 3] * h[3] / h[2] * (phi[3] / h[3] + 1) * second
