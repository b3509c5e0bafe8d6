"""Noise schedules against the original's tables, orders of the solvers, and sampling against diffusers' DDPM."""

import math

import pytest
import torch
from networks import build

from dcae_fast.sampling import dpm_solver, flow, gaussian

TABLE, DOUBLE_TABLE, POSTERIOR = 1e-6, 1e-12, 2e-6


@pytest.mark.parametrize("steps", [6, 10, 20, 25, 30])
def test_grid_of_dpm_solver(open_case, compare, steps):
    tables = open_case("diffusion_tables", "").tensors("dpm")
    grid = dpm_solver.grid(steps)
    compare("diffusion_tables", torch.tensor(grid.t), tables[f"timesteps_{steps}"], TABLE, "times")
    assert dpm_solver.orders(steps) == tables[f"orders_{steps}"].tolist()


@pytest.mark.parametrize("steps", range(1, 100))
def test_orders_of_dpm_solver_add_up(steps):
    assert sum(dpm_solver.orders(steps)) == steps


def test_schedule_of_dpm_solver(open_case, compare):
    tables = open_case("diffusion_tables", "").tensors("dpm")
    compare("diffusion_tables", dpm_solver.betas(), tables["betas_float64"], DOUBLE_TABLE, "betas")
    cumulative = (1 - dpm_solver.betas()).cumprod(0)
    compare("diffusion_tables", cumulative, tables["cum_alphas_1001"][1:], DOUBLE_TABLE, "cumulative alphas")
    log_alphas = dpm_solver.log_alpha(tables["t_discrete"])
    compare("diffusion_tables", log_alphas, tables["log_alpha_discrete"], TABLE, "log alpha at the knots")
    log_alphas = dpm_solver.log_alpha(tables["probe_t"])
    compare("diffusion_tables", log_alphas, tables["probe_log_alpha"], TABLE, "log alpha")


@pytest.mark.parametrize("steps", [250, 1000])
def test_tables_of_gaussian_diffusion(open_case, compare, steps):
    expected = open_case("diffusion_tables", "").tensors(f"gaussian_{steps}")
    assert gaussian.kept_times(steps) == expected["timestep_map"].tolist()
    tables = gaussian.tables(steps, torch.float64, torch.device("cpu"))
    for got, name in [
        (tables.alpha**2, "alphas_cumprod"),
        (tables.log_beta.exp(), "betas"),
        (tables.log_beta_tilde, "posterior_log_variance_clipped"),
        (tables.mean_clean, "posterior_mean_coef1"),
        (tables.mean_noisy, "posterior_mean_coef2"),
    ]:
        compare("diffusion_tables", got, expected[name], DOUBLE_TABLE, f"{name}, {steps} steps")


DEVIATION = 0.3  # of the data, which is normal: the perfect networks and the solutions are then known


def perfect_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[z - ε | x_t = x]; the solution of dx = v dt is proportional to the deviation of x_t."""
    return (t * DEVIATION**2 - (1 - t)) / (t**2 * DEVIATION**2 + (1 - t) ** 2) * x


def test_heun2_is_of_order_2():
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    coarse, fine = (abs(flow.ode_heun2(perfect_velocity, start, steps).item() - DEVIATION) for steps in (101, 201))
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_updates_of_dpm_solver_are_of_their_order(order):
    """With a smooth schedule, α² = sigmoid(2 λ), and equal steps of λ."""

    def error(updates: int) -> float:
        lam = torch.linspace(-2, 2, updates * order + 1, dtype=torch.float64)
        alpha2, sigma2 = torch.sigmoid(2 * lam), torch.sigmoid(-2 * lam)
        points = dpm_solver.Grid(*(table.tolist() for table in (lam, alpha2.sqrt(), sigma2.sqrt(), lam)))
        deviations = (alpha2 * DEVIATION**2 + sigma2).sqrt()

        def network(x, t):
            """E[ε | x_t = x]."""
            i = (lam - t / 1000).abs().argmin()
            return sigma2[i].sqrt() / deviations[i] ** 2 * x

        x = torch.ones(1, dtype=torch.float64)
        for i in range(0, updates * order, order):
            x = dpm_solver.update(network, x, points, i, order)
        return (x - deviations[-1] / deviations[0]).abs().item()

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.1)


def test_sde_keeps_the_distribution():
    """The final deviation is that of the data, within the errors of the steps and of 20000 samples."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 1, 1, 1, generator=generator)
    samples = flow.sde(perfect_velocity, noise, 250, generator)
    assert samples.std().item() == pytest.approx(DEVIATION, rel=0.03)
    assert samples.mean().item() == pytest.approx(0, abs=0.01)


def test_gaussian_diffusion_is_ddpm_of_diffusers(compare):
    """With equal settings and generators, for a network that depends on state and time."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(250)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        return torch.cat([0.9 * x, torch.sin(x + t)], dim=1)

    x, generator = noise, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, generator=generator).prev_sample
    samples = gaussian.sample(network, noise, 250, torch.Generator().manual_seed(1))
    compare("diffusers' DDPM", samples, x, 2e-5)


@pytest.mark.cases("diffusion_dit", "posterior")
def test_posterior(case, compare):
    tensors = case.tensors("posterior")
    with torch.no_grad():
        out = build(case)(tensors["x"], tensors["model_time"].float(), tensors["y"])
    tables = gaussian.tables(250, out.dtype, out.device)
    mean, log_variance = gaussian.model_posterior(out, tensors["x"], tensors["step"].view(-1, 1, 1, 1), tables)
    compare(case.file, mean, tensors["mean"], POSTERIOR, "mean")
    compare(case.file, log_variance, tensors["log_variance"], POSTERIOR, "log-variance")
