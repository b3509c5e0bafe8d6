"""Adversarial losses, adaptive weight, R1 and LeCam against their formulas, in one process and in two."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcae_fast
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.training.autoencoder.adversarial import (
    LeCam,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
)
from dcae_fast.training.autoencoder.discriminator import PatchDiscriminator
from dcae_fast.training.engine.parallel import apply_ddp, apply_fsdp

RANKS = 2
REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.25]], dtype=torch.float64)
FAKE = torch.tensor([[-2.0, 0.5, -0.75]], dtype=torch.float64)


def mean(numbers) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def softplus(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).exp().add(1).log().item()


def test_hinge_losses_are_their_formulas():
    real, fake = REAL.flatten().tolist(), FAKE.flatten().tolist()
    assert generator_loss(FAKE, "hinge").item() == pytest.approx(-mean(fake))
    expected = (mean(max(0, 1 - x) for x in real) + mean(max(0, 1 + x) for x in fake)) / 2
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(expected)


def test_non_saturating_losses_are_their_formulas():
    real, fake = REAL.flatten().tolist(), FAKE.flatten().tolist()
    assert generator_loss(FAKE, "non-saturating").item() == pytest.approx(mean(softplus(-x) for x in fake))
    expected = (mean(softplus(-x) for x in real) + mean(softplus(x) for x in fake)) / 2
    assert discriminator_loss(REAL, FAKE, "non-saturating").item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["hinge", "non-saturating"])
def test_gradients_and_precision_of_the_losses(kind):
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: generator_loss(x, kind), (fake,))
    assert torch.autograd.gradcheck(lambda x, y: discriminator_loss(x, y, kind), (real, fake))
    half = [x.detach().bfloat16() for x in (real, fake)]  # these values are exact in bfloat16
    assert discriminator_loss(*half, kind).dtype == generator_loss(half[1], kind).dtype == torch.float32
    assert discriminator_loss(*half, kind).item() == pytest.approx(discriminator_loss(real, fake, kind).item())


def test_an_unknown_kind_is_named():
    for call in (lambda: generator_loss(FAKE, "wgan"), lambda: discriminator_loss(REAL, FAKE, "wgan")):
        with pytest.raises(ValueError, match="kind='wgan'; expected one of hinge, non-saturating"):
            call()


def quadratic(factor: float = 1.0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For adaptive_weight: y = w = (3, 4), R = |y|², G = factor * sum(y); |dR/dw| = 10, |dG/dw| = factor √2."""
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    y = w.clone()
    return y, scale * 2 * y.detach(), scale * factor * torch.ones(2), w


@pytest.mark.parametrize("factor, clamp", [(1.0, 1e4), (-2.0, 1e4), (1e-5, 1e4), (1e-5, 100.0), (0.0, 1e6)])
def test_adaptive_weight_is_its_formula(factor, clamp):
    y, *gradients, w = quadratic(factor)
    weight = adaptive_weight(y, *gradients, w, clamp)
    assert weight.item() == pytest.approx(min(10 / (abs(factor) * 2**0.5 + 1e-4), clamp))
    assert weight.shape == () and not weight.requires_grad and w.grad is None
    y.sum().backward()  # the graph is kept
    assert w.grad is not None


def test_the_scale_of_the_gradient_scaler_cancels():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for factor in (1.0, 1e-5):
        scaled = adaptive_weight(*quadratic(factor, scale=2.0**12), scaler=scaler)
        torch.testing.assert_close(scaled, adaptive_weight(*quadratic(factor)), rtol=1e-6, atol=0)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert adaptive_weight(*quadratic(), scaler=disabled) == adaptive_weight(*quadratic())


def test_the_scaler_keeps_small_float16_gradients():
    def weight(scaler):
        w = torch.ones(4, requires_grad=True)
        y = w.half() * 2.0**-13
        gradient = torch.full((4,), 2.0**-13)  # of w: 2^-26, which is 0 in float16
        gradient = scaler.scale(gradient) if scaler else gradient
        return adaptive_weight(y, gradient, 1000 * gradient, w, scaler=scaler)

    assert weight(None) == 0
    assert weight(torch.amp.GradScaler("cpu", init_scale=2.0**16)) > 0


def test_adaptive_weight_of_a_patched_decoder():
    """The fast operators compute in float32; without a GPU, Triton's interpreter runs their kernels."""
    weights = []
    for patch in (False, True):
        model = DCAE.from_pretrained("dc-ae-tiny").train()
        if patch:
            dcae_fast.patch(model)
        x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        last_weight = model.decoder.project_out.op_list[-1].conv.conv.weight
        y = model(x)
        weights.append(adaptive_weight(y, *two_gradients(y, x), last_weight))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=0)


def test_adaptive_weight_names_bad_arguments():
    y, *gradients, w = quadratic()
    with pytest.raises(ValueError, match="clamp=0; expected a positive number"):
        adaptive_weight(y, *gradients, w, clamp=0)
    with pytest.raises(ValueError, match="last_weight requires no gradient"):
        adaptive_weight(y, *gradients, w.detach())
    for other in (y.detach(), torch.ones(2, requires_grad=True) * 1):
        with pytest.raises(ValueError, match="y does not depend on last_weight"):
            adaptive_weight(other, *gradients, w)


def test_gradient_penalty_is_its_formula():
    """D(x) = sum over pixels of a x + b x²: dD/dx = a + 2 b x."""
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, -1.5))
    penalty = gradient_penalty(x, (a * x + b * x**2).sum(1, keepdim=True))
    gradient = a + 2 * b * x
    torch.testing.assert_close(penalty, (gradient**2).sum((1, 2, 3)).mean())
    penalty.backward()
    torch.testing.assert_close(a.grad, 2 * gradient.sum() / 3)
    torch.testing.assert_close(b.grad, (4 * gradient * x).sum() / 3)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_the_gradient_of_the_penalty_is_right_for_the_discriminator(norm):
    """Against differences. Softplus replaces LeakyReLU, at whose kink the penalty jumps."""
    torch.manual_seed(0)
    network = PatchDiscriminator(3, 2, norm).double()
    for number, module in enumerate(network.main):
        if isinstance(module, nn.LeakyReLU):
            network.main[number] = nn.Softplus()
    network.eval()  # no iteration of the spectral norm between the evaluations
    x = torch.randn(2, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    weight = network.main[2].parametrizations.weight.original if norm == "spectral" else network.main[2].weight
    (gradient,) = torch.autograd.grad(gradient_penalty(x, network(x)), weight)
    start, direction, values = weight.detach().clone(), torch.randn_like(weight), []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.copy_(start + step * direction)
        values.append(gradient_penalty(x, network(x)).item())
    expected = (values[0] - values[1]) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=0)


def test_gradient_penalty_names_bad_arguments():
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match="real_images requires no gradient"):
        gradient_penalty(x, x.sum())
    for logits in (torch.ones(1), torch.ones(1, requires_grad=True)):
        with pytest.raises(ValueError, match="real_logits does not depend on real_images"):
            gradient_penalty(x.requires_grad_(), logits)


def test_lecam_is_its_formula():
    lecam, decay = LeCam(0.9), 0.9
    real_average = fake_average = total = 0.0
    for step in range(3):
        real, fake = (REAL + step).requires_grad_(), (FAKE - step).requires_grad_()
        penalty = lecam(real, fake)
        real_average = decay * real_average + (1 - decay) * real.mean().item()
        fake_average = decay * fake_average + (1 - decay) * fake.mean().item()
        total = decay * total + 1 - decay
        expected = F.relu(real - fake_average / total).square().mean()
        expected += F.relu(real_average / total - fake).square().mean()
        torch.testing.assert_close(penalty, expected, rtol=1e-5, atol=0)
        for ours, theirs in zip(
            torch.autograd.grad(penalty, (real, fake)), torch.autograd.grad(expected, (real, fake)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    other = LeCam(0.9)
    other.load_state_dict(lecam.state_dict())
    assert set(other.state_dict()) == {"real", "fake", "total"}
    assert torch.equal(other(REAL, FAKE), lecam(REAL, FAKE))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_lecam_names_a_bad_decay(decay):
    with pytest.raises(ValueError, match=f"decay={decay}; expected at least 0 and less than 1"):
        LeCam(decay)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 3))]
    return nn.Sequential(convolutions[0], nn.SiLU(), convolutions[1], nn.SiLU(), convolutions[2])


def two_losses(made: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = torch.linspace(-1, 1, 27, device=made.device).view(1, 3, 3, 3)
    return (made - x).abs().mean(), F.softplus(-F.conv2d(made, kernel)).mean()


def two_gradients(y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of both losses by y."""
    made = y.detach().requires_grad_()
    return [torch.autograd.grad(loss, made)[0] for loss in two_losses(made, x)]


def trained(network: nn.Module, called: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The adaptive weight, and the gradients of the weighted sum of both losses."""
    y = called(x)
    reconstruction, adversarial = two_gradients(y, x)
    weight = adaptive_weight(y, reconstruction, adversarial, network[-1].weight)
    y.backward(reconstruction + weight * adversarial)
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in network.parameters()]
    return weight, gradients


def in_each_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    x = torch.randn(2 * RANKS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mine = x[2 * rank : 2 * rank + 2]
    results = {}
    for parallel in ("ddp", "fsdp"):
        network = small_network()
        called = apply_ddp(network) if parallel == "ddp" else apply_fsdp(network, [network[0], network[2]])
        results[parallel] = trained(network, called, mine)
    network = small_network()
    called = apply_fsdp(network, [network[4]])  # resharded after the forward pass
    y = called(mine)
    with pytest.raises(ValueError, match="y does not depend on last_weight: it is sharded"):
        adaptive_weight(y, *two_gradients(y, mine), network[4].weight)
    mesh = init_device_mesh("cpu", (RANKS,))
    w = nn.Parameter(distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Shard(0)]))
    results["sharded"] = adaptive_weight(w.clone().full_tensor(), torch.tensor([6.0, 8.0]), torch.ones(2), w)
    lecam = LeCam(0.9)
    results["lecam"] = [lecam(REAL[rank], FAKE + rank), lecam.real, lecam.fake]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # destroying the gloo group of DDP may wait forever for a thread that needs the GIL


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(in_each_rank, (str(folder),), RANKS, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


needs_ranks = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")


@needs_ranks
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_adaptive_weight_on_two_ranks_is_that_of_one(ranks, parallel):
    network = small_network()
    x = torch.randn(2 * RANKS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    weight, gradients = trained(network, network, x)
    assert torch.equal(ranks[0][parallel][0], ranks[1][parallel][0])
    torch.testing.assert_close(ranks[0][parallel][0], weight, rtol=1e-5, atol=0)
    torch.testing.assert_close(ranks[0][parallel][1], gradients, rtol=1e-4, atol=1e-6)


@needs_ranks
def test_adaptive_weight_of_a_sharded_tensor(ranks):
    for each in ranks:
        torch.testing.assert_close(each["sharded"], adaptive_weight(*quadratic()), rtol=1e-6, atol=0)


@needs_ranks
def test_lecam_averages_over_the_ranks(ranks):
    lecam = LeCam(0.9)
    real = torch.stack([REAL[rank] for rank in range(RANKS)])
    fake = torch.stack([FAKE + rank for rank in range(RANKS)])
    penalty = lecam(real, fake)
    for each in ranks:
        assert each["lecam"][1:] == [lecam.real, lecam.fake]
    assert mean(each["lecam"][0].item() for each in ranks) == pytest.approx(penalty.item(), rel=1e-6)
