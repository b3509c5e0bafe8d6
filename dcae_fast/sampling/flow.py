"""The samplers of SiT (arXiv 2401.08740) for networks that predict the velocity of a linear path.

    x_t = t z + (1 - t) ε,    v = z - ε,    t from 0 (noise) to 1 (data), network time t

Each sampler solves an ordinary or a stochastic differential equation from t = 0 to 1. The solution at t has the
distribution of x_t.
"""

import math
from functools import partial

import torch

from . import steps as stepping
from .arguments import Network, check


@torch.no_grad()
def ode_dopri5(
    network: Network,
    noise: torch.Tensor,
    steps: int = 250,
    generator: torch.Generator | None = None,
    run: stepping.Run = stepping.run,
) -> torch.Tensor:
    """dx = v dt by the adaptive Dormand-Prince method of order 5: torchdiffeq, atol 1e-6, rtol 1e-3.

    The solver chooses its steps by the error over the whole batch and calls the network some 20 to 100 times, also at
    times slightly after t = 1, from which it interpolates back. `steps`, `generator` and `run` are not used: in the
    original, `steps` is the number of times to interpolate at, which does not change the result at t = 1. Raises
    ImportError without torchdiffeq.
    """
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError("ODE_dopri5 needs torchdiffeq: pip install 'dcae_fast[ode]'") from error
    check(noise, steps, least=1)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=noise.device)

    def velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return network(x, t.item())

    return torchdiffeq.odeint(velocity, noise, ends, rtol=1e-3, atol=1e-6, method="dopri5")[-1]


@torch.no_grad()
def ode_heun2(
    network: Network,
    noise: torch.Tensor,
    steps: int = 250,
    generator: torch.Generator | None = None,
    run: stepping.Run = stepping.run,
) -> torch.Tensor:
    """dx = v dt by Heun's method of order 2 on linspace(0, 1, steps): 2 (steps - 1) calls of the network.

        k_1 = v(x, t),    k_2 = v(x + Δ k_1, t + Δ),    x ← x + Δ (k_1 + k_2) / 2

    Deterministic: `generator` is not used.
    """
    check(noise, steps, least=2)
    dt, x = 1 / (steps - 1), noise
    for step in stepping.linear_steps([partial(heun, t=i * dt, dt=dt) for i in range(steps - 1)], noise):
        x = run(network, step, x)
    return x


def heun(network: Network, x: torch.Tensor, t: float, dt: float) -> torch.Tensor:
    start = network(x, t)
    end = network(x + dt * start, t + dt)
    return x + dt / 2 * (start + end)


@torch.no_grad()
def sde(
    network: Network,
    noise: torch.Tensor,
    steps: int = 250,
    generator: torch.Generator | None = None,
    run: stepping.Run = stepping.run,
) -> torch.Tensor:
    """dx = (v + (1 - t) s) dt + √(2 (1 - t)) dW by Euler-Maruyama: `steps` calls of the network.

    The score s = (t v - x) / (1 - t) follows from the velocity, so the drift is (1 + t) v - x. The times are
    linspace(0, 0.96, steps), followed by one step of 0.04 without noise.
    """
    check(noise, steps, least=2)
    last = 0.96
    dt, x = last / (steps - 1), noise
    updates = [partial(euler_maruyama, t=i * dt, dt=dt) for i in range(steps - 1)]
    for step in stepping.linear_steps(updates, noise, noises=1):
        x = run(network, step, x, torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device))
    (step,) = stepping.linear_steps([partial(euler, t=last, dt=1 - last)], noise)
    return run(network, step, x)


def euler_maruyama(network: Network, x: torch.Tensor, noise: torch.Tensor, t: float, dt: float) -> torch.Tensor:
    return euler(network, x, t, dt) + math.sqrt(2 * (1 - t) * dt) * noise


def euler(network: Network, x: torch.Tensor, t: float, dt: float) -> torch.Tensor:
    return x + dt * ((1 + t) * network(x, t) - x)
