"""The training losses, their gradients and the distributions of times against the original implementation."""

import math

import pytest
import torch
from networks import build

from dcae_fast.sampling import OBJECTIVES, losses

LOSS, GRADIENT = 2e-6, 2e-5


def arguments(case) -> tuple[torch.Tensor, ...]:
    """z, labels after dropping, t and noise."""
    tensors = case.tensors("train")
    return tuple(tensors[name] for name in ("x", "labels_used", "t", "noise"))


def in_float64(case) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments(case))


@pytest.mark.cases("diffusion_*", "train")
def test_losses(case, compare):
    """In float64, where rounding does not depend on the processor."""
    tensors, model = case.tensors("train"), build(case).double()
    loss = OBJECTIVES[case.meta["train_scheduler"]].loss(model, *in_float64(case))
    compare(case.file, loss, torch.tensor(case.meta["loss"]), LOSS, "loss")
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == case.meta["grad_l2"].keys()
    for name, norm in case.meta["grad_l2"].items():
        compare(case.file, gradients[name].norm(), torch.tensor(norm), GRADIENT, f"{name}, norm")
        if f"grad/{name}" in tensors:
            compare(case.file, gradients[name], tensors[f"grad/{name}"], GRADIENT, name)
    total = math.hypot(*(gradient.norm().item() for gradient in gradients.values()))
    assert total == pytest.approx(case.meta["total_grad_l2"], rel=GRADIENT)


@pytest.mark.cases("diffusion_*", "train")
@torch.no_grad()
def test_noisy_latents_and_times(case, compare):
    """The arguments of the network."""
    tensors, given = case.tensors("train"), []

    def network(x, t, labels):
        given.extend([x, t, labels])
        return tensors["model_out"]

    OBJECTIVES[case.meta["train_scheduler"]].loss(network, *arguments(case))
    x, t, labels = given
    compare(case.file, x, tensors["x_t"], LOSS, "x_t")
    assert torch.equal(t, tensors["t"].float()) and torch.equal(labels, tensors["labels_used"])


@pytest.mark.cases("diffusion_dit", "train")
@torch.no_grad()
def test_terms_of_gaussian_diffusion(case, compare):
    tensors = case.tensors("train")
    mse, vb = losses.gaussian_diffusion_terms(build(case).double(), *in_float64(case))
    compare(case.file, mse, tensors["mse"], LOSS, "mse")
    compare(case.file, vb, tensors["vb"], LOSS, "vb")


@pytest.mark.parametrize("name, lo, hi", [("DPM_Solver", 1, 1000), ("GaussianDiffusion", 0, 999)])
def test_drawn_steps(name, lo, hi):
    t = OBJECTIVES[name].draw_time(100_000, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and (t.min(), t.max()) == (lo, hi)
    assert t.double().mean().item() == pytest.approx((lo + hi) / 2, rel=0.01)


def test_drawn_times_of_the_flow():
    t = OBJECTIVES["SiTSampler"].draw_time(100_000, generator=torch.Generator().manual_seed(0))
    assert 0 <= t.min() < 1e-3 and 1 - 1e-3 < t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, rel=0.01)


def test_bins_of_the_likelihood_add_up():
    """Over all 256 values of 8 bits, for any mean and deviation."""
    z = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, deviation in [(0.0, 0.5), (0.9, 0.05), (-3.0, 1.0)]:
        log_variance = torch.tensor(2 * math.log(deviation), dtype=torch.float64)
        log_likelihood = losses.discretized_log_likelihood(z, torch.tensor(mean, dtype=torch.float64), log_variance)
        assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_after_a_loss_in_inference_mode(name):
    """The tables are cached, so they must not be inference tensors, which do not allow gradients."""
    z, factor = torch.randn(2, 3, 4, 4), torch.ones((), requires_grad=True)
    objective = OBJECTIVES[name]

    def network(x, t, labels):
        return factor * (torch.cat([x, x], dim=1) if name == "GaussianDiffusion" else x)

    losses.dpm_solver_tables.cache_clear()
    losses.gaussian.tables.cache_clear()
    for inference in (True, False):
        with torch.inference_mode(inference):
            loss = objective.loss(network, z, None, objective.draw_time(2), torch.randn_like(z))
    loss.backward()
    assert factor.grad.isfinite() and factor.grad != 0
