"""Training losses of the diffusion transformers and the distributions of their times. The names are the original's.

Each loss is a function loss(network, z, labels, t, noise) -> scalar:

network: called as network(x, t, labels), with x [B, C, h, w] and t [B] in z.dtype and the given labels. In training
    mode, the network itself replaces some labels with the null label.
z: [B, C, h, w], the clean, scaled latent, float32 or float64. noise: the same shape, standard normal.
labels: [B]. t: [B], on the device of z, from `draw_time(batch, device, generator)` of the same objective.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import dpm_solver, gaussian
from .arguments import Model


class Objective(NamedTuple):
    draw_time: Callable[..., torch.Tensor]
    loss: Callable[..., torch.Tensor]


def draw_dpm_solver_time(
    batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Times uniform in 1 ... 1000: [batch] int64."""
    return torch.randint(1, 1001, (batch,), device=device, generator=generator)


def dpm_solver_loss(
    network: Model, z: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """mean (ε̂ - ε)² at x = √ᾱ_t z + √(1 - ᾱ_t) ε, ᾱ_t = Π_{i<=t} (1 - β_i), t in 1 ... 1000. Network time t."""
    alpha, sigma = dpm_solver_tables(z.dtype, z.device)
    x = alpha[per_sample(t)] * z + sigma[per_sample(t)] * noise
    return F.mse_loss(network(x, t.to(z.dtype), labels).to(z.dtype), noise)


@cache
def dpm_solver_tables(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """√ᾱ and √(1 - ᾱ) for t = 0 (data) ... 1000: [1001], computed in float64."""
    alpha_bar = F.pad((1 - dpm_solver.betas()).cumprod(0), (1, 0), value=1)
    return alpha_bar.sqrt().to(device, dtype), (1 - alpha_bar).sqrt().to(device, dtype)


def draw_sit_time(
    batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Times uniform in [0, 1): [batch]."""
    return torch.rand(batch, device=device, generator=generator)


def sit_loss(
    network: Model, z: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """mean (v̂ - (z - ε))² at x = t z + (1 - t) ε, t in [0, 1]. Network time t; t = 1 is data."""
    t = t.to(z.dtype)
    x = per_sample(t) * z + (1 - per_sample(t)) * noise
    return F.mse_loss(network(x, t, labels).to(z.dtype), z - noise)


def draw_gaussian_diffusion_time(
    batch: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Times uniform in 0 ... 999: [batch] int64."""
    return torch.randint(gaussian.TIMES, (batch,), device=device, generator=generator)


def gaussian_diffusion_loss(
    network: Model, z: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """mean over the batch of the two `gaussian_diffusion_terms`."""
    mse, vb = gaussian_diffusion_terms(network, z, labels, t, noise)
    return (mse + vb).mean()


def gaussian_diffusion_terms(
    network: Model, z: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean (ε̂ - ε)² and the variational bound, each [B], at x = √ᾱ_t z + √(1 - ᾱ_t) ε, t in 0 ... 999. Network time t.

    The bound is KL(q(x_{t-1} | x_t, z) ‖ p(x_{t-1} | x_t)); at t = 0 it is -ln p(z | x_0), with p over bins of width
    2/255. It is in bits, the mean over all elements, and trains only the variance: its gradient does not reach ε̂.
    """
    tables, n = gaussian.tables(gaussian.TIMES, z.dtype, z.device), per_sample(t)
    x = tables.alpha[n] * z + tables.sigma[n] * noise
    out = network(x, t.to(z.dtype), labels).to(z.dtype)
    predicted, v = out.chunk(2, dim=1)
    mean, log_variance = gaussian.model_posterior(torch.cat([predicted.detach(), v], dim=1), x, n, tables)
    true_mean = tables.mean_clean[n] * z + tables.mean_noisy[n] * x
    kl = normal_kl(true_mean, tables.log_beta_tilde[n], mean, log_variance)
    vb = torch.where(n == 0, -discretized_log_likelihood(z, mean, log_variance), kl)
    return (predicted - noise).square().mean(dim=(1, 2, 3)), vb.mean(dim=(1, 2, 3)) / math.log(2)


def normal_kl(
    mean_1: torch.Tensor, log_variance_1: torch.Tensor, mean_2: torch.Tensor, log_variance_2: torch.Tensor
) -> torch.Tensor:
    """KL(N_1 ‖ N_2) = ½ (ln(V_2 / V_1) - 1 + (V_1 + (m_1 - m_2)²) / V_2), in nats."""
    difference = log_variance_1 - log_variance_2
    squares = (mean_1 - mean_2).square() * torch.exp(-log_variance_2)
    return (difference.exp() - difference - 1 + squares) / 2


def discretized_log_likelihood(z: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """ln of the normal probability of z's bin, of width 2/255 and unbounded beyond ±0.999; at least ln 1e-12."""
    inverse_deviation = torch.exp(-log_variance / 2)
    below_upper = normal_cdf(inverse_deviation * (z - mean + 1 / 255))
    below_lower = normal_cdf(inverse_deviation * (z - mean - 1 / 255))
    probability = torch.where(
        z < -0.999, below_upper, torch.where(z > 0.999, 1 - below_lower, below_upper - below_lower)
    )
    return probability.clamp(min=1e-12).log()


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The approximation ½ (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def per_sample(t: torch.Tensor) -> torch.Tensor:
    """[B] as [B, 1, 1, 1]."""
    return t.view(-1, 1, 1, 1)


OBJECTIVES = {
    "DPM_Solver": Objective(draw_dpm_solver_time, dpm_solver_loss),
    "SiTSampler": Objective(draw_sit_time, sit_loss),
    "GaussianDiffusion": Objective(draw_gaussian_diffusion_time, gaussian_diffusion_loss),
}
