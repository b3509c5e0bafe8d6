"""Gaussian diffusion with a learned variance (arXiv 2102.09672), for networks that predict the noise and the variance.

    x_n = √ᾱ_n z + √(1 - ᾱ_n) ε,    ᾱ_n = Π_{i<=n} (1 - β_i),    β = linspace(1e-4, 0.02, 1000),    n = 0 ... 999

The network's time is n. It returns 2C channels. The first C are ε̂. The last C are v, which interpolates the logarithm
of the variance between two bounds: β̃_n, the variance of q(x_{n-1} | x_n, z), at v = -1, and β_n at v = 1.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from . import steps as stepping
from .arguments import Network, check

TIMES = 1000


class Tables(NamedTuple):
    """Tables over time: √ᾱ, √(1 - ᾱ), ln β, ln β̃, and a, b of the mean a z + b x_n of q."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    log_beta: torch.Tensor
    log_beta_tilde: torch.Tensor
    mean_clean: torch.Tensor
    mean_noisy: torch.Tensor


def kept_times(steps: int) -> list[int]:
    """`steps` evenly spaced times in 0 ... 999, including both ends."""
    return [round(i * (TIMES - 1) / (steps - 1)) for i in range(steps)]


@cache
def tables(steps: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """Tables [steps] of the diffusion with the kept times only, n = 0 ... steps - 1, computed in float64.

    β_n = 1 - ᾱ_n / ᾱ_{n-1},    β̃_n = β_n (1 - ᾱ_{n-1}) / (1 - ᾱ_n),    ln β̃_1 replaces ln β̃_0 = -∞
    a = √ᾱ_{n-1} β_n / (1 - ᾱ_n),    b = √(1 - β_n) (1 - ᾱ_{n-1}) / (1 - ᾱ_n)
    """
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64)).cumprod(0)[kept_times(steps)]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    beta_tilde = beta * (1 - previous) / (1 - alpha_bar)
    log_beta_tilde = torch.cat([beta_tilde[1:2], beta_tilde[1:]]).log()
    mean_clean = previous.sqrt() * beta / (1 - alpha_bar)
    mean_noisy = (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    by_time = (alpha, sigma, beta.log(), log_beta_tilde, mean_clean, mean_noisy)
    return Tables(*(table.to(device, dtype) for table in by_time))


def model_posterior(
    out: torch.Tensor, x: torch.Tensor, n: torch.Tensor | tuple[()], tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, [B, C, h, w], of the model's p(x_{n-1} | x_n).

    out: [B, 2C, h, w], the network's output for x [B, C, h, w]. n: index into the tables, [B, 1, 1, 1], or () for
    tables of a single time. Raises ValueError if `out` has no variance.
    """
    if out.shape[1] != 2 * x.shape[1]:
        raise ValueError(f"the network returned {out.shape[1]} channels; expected {2 * x.shape[1]}, noise and variance")
    noise, v = out.chunk(2, dim=1)
    clean = (x - tables.sigma[n] * noise) / tables.alpha[n]
    mean = tables.mean_clean[n] * clean + tables.mean_noisy[n] * x
    return mean, (1 + v) / 2 * tables.log_beta[n] + (1 - v) / 2 * tables.log_beta_tilde[n]


@torch.no_grad()
def sample(
    network: Network,
    noise: torch.Tensor,
    steps: int = 250,
    generator: torch.Generator | None = None,
    run: stepping.Run = stepping.run,
) -> torch.Tensor:
    """Ancestral sampling, x_{n-1} ~ p(x_{n-1} | x_n), in `steps` calls of the network, 2 to 1000.

    The predicted latent is not clipped. The last step returns the mean. Raises ValueError if the network returns no
    variance.
    """
    check(noise, steps, least=2, most=TIMES)
    times, x = kept_times(steps), noise
    numbers = torch.stack(tables(steps, noise.dtype, noise.device), dim=1)
    for n in range(steps - 1, 0, -1):
        step_noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = run(network, stepping.Step(ancestral, (float(times[n]),), numbers[n]), x, step_noise)
    return run(network, stepping.Step(ancestral, (float(times[0]),), numbers[0]), x)


def ancestral(
    network: Network, x: torch.Tensor, times: Sequence[float], numbers: torch.Tensor, *noise: torch.Tensor
) -> torch.Tensor:
    """mean + exp(log-variance / 2) · noise, or the mean without noise. numbers: a row of the tables, [6]."""
    (t,) = times
    mean, log_variance = model_posterior(network(x, t), x, (), Tables(*numbers))
    return mean + (log_variance / 2).exp() * noise[0] if noise else mean
