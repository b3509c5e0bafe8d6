"""Every sampler against trajectories of the original implementation; errors for wrong arguments."""

import functools
import sys

import pytest
import torch
from networks import Recorder, recorder

from dcae_fast.sampling import SAMPLERS, dpm_solver, flow, gaussian

SAMPLES, REPLAY, EXACT, TIMES = 2e-5, 1e-5, 5e-3, 1e-6


def scales(case) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The guidance scales of a case, each with its recording."""
    return [(float(scale), case.tensors(f"{case.name}/scale{scale}")) for scale in case.meta["scales"]]


def compare_times(times: list[float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(times, dtype=torch.float64), expected, atol=TIMES, rtol=TIMES)


@pytest.fixture
def step_noise(monkeypatch):
    """step_noise(tensors) makes torch.randn return these tensors, one per call."""

    def give(tensors: torch.Tensor) -> None:
        remaining = iter(tensors)
        monkeypatch.setattr(torch, "randn", lambda shape, **_: next(remaining))

    return give


@pytest.mark.cases("diffusion_*", "generate_dpm_solver*")
def test_dpm_solver(case, compare):
    steps, noise = case.meta["steps"], case.tensors(case.name)["noise"]
    for scale, recorded in scales(case):
        network = recorder(case, scale)
        samples = dpm_solver.sample(network, noise, steps)
        compare(case.file, samples, recorded["samples"], SAMPLES, f"samples, scale {scale}")
        compare_times(network.times, recorded["model_times"])
        starts = torch.tensor(dpm_solver.orders(steps)).cumsum(0)[:-1]
        states = torch.stack([*(network.states[i] for i in starts), samples])
        compare(case.file, states, recorded["after_each_update"], SAMPLES, f"after each update, scale {scale}")


@pytest.mark.cases("diffusion_*", "generate_ode_heun2")
def test_heun2(case, compare):
    noise = case.tensors(case.name)["noise"]
    for scale, recorded in scales(case):
        network = recorder(case, scale)
        samples = flow.ode_heun2(network, noise, case.meta["steps"])
        compare(case.file, samples, recorded["samples"], SAMPLES, f"samples, scale {scale}")
        compare_times(network.times, recorded["model_times"])


@pytest.mark.cases("diffusion_*", "generate_sde")
def test_sde(case, compare, step_noise):
    noise = case.tensors(case.name)["noise"]
    for scale, recorded in scales(case):
        network = recorder(case, scale)
        step_noise(recorded["step_noise"])
        samples = flow.sde(network, noise, case.meta["steps"])
        compare(case.file, samples, recorded["samples"], SAMPLES, f"samples, scale {scale}")
        first, second = recorded["model_times"].view(-1, 2).unbind(1)  # the original calls it twice with the same
        assert torch.equal(first, second)
        compare_times(network.times, first)


@pytest.mark.cases("diffusion_*", "generate_gaussian")
def test_gaussian_diffusion(case, compare, step_noise):
    noise = case.tensors(case.name)["noise"]
    for scale, recorded in scales(case):
        network = recorder(case, scale)
        step_noise(recorded["step_noise"])
        samples = gaussian.sample(network, noise, case.meta["steps"])
        compare(case.file, samples, recorded["samples"], SAMPLES, f"samples, scale {scale}")
        assert network.times == recorded["model_times"].tolist()


@pytest.mark.cases("diffusion_*", "generate_ode_dopri5")
def test_dopri5_on_the_recorded_steps(case, compare, monkeypatch):
    odeint = pytest.importorskip("torchdiffeq").odeint
    noise = case.tensors(case.name)["noise"]
    for scale, recorded in scales(case):
        network, accepted = recorder(case, scale), recorded["accepted_times"]
        options = {"first_step": 10.0, "ifactor": 100.0, "step_t": accepted}  # no error is too large: up to the next
        replay = functools.partial(odeint, options=options)
        monkeypatch.setattr(
            "torchdiffeq.odeint", lambda *args, replay=replay, **kw: replay(*args, **kw | {"rtol": 1e9, "atol": 1e9})
        )
        samples = flow.ode_dopri5(network, noise)
        compare(case.file, samples, recorded["samples"], REPLAY, f"samples, scale {scale}")
        ends = network.times[6::6]  # after the first call, six in each step: the last two at its end
        torch.testing.assert_close(torch.tensor(ends).double(), accepted, atol=TIMES, rtol=TIMES)


@pytest.mark.cases("diffusion_*", "generate_ode_dopri5")
def test_dopri5_with_its_own_steps(case, compare):
    pytest.importorskip("torchdiffeq")
    noise = case.tensors(case.name)["noise"]
    for scale, recorded in scales(case):
        network = recorder(case, scale)
        samples = flow.ode_dopri5(network, noise)
        compare(case.file, samples, recorded["exact"], EXACT, f"samples, scale {scale}")
        first_step = network.times[6]  # two calls to choose it, and its stages
        assert first_step == pytest.approx(recorded["first_step"].item(), rel=1e-2)


def test_all_samplers_share_a_signature():
    """Equal noise, steps and generator give equal latents. Counts the calls of the network."""
    pytest.importorskip("torchdiffeq")
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    calls = {"DPM_Solver": 6, "ODE_heun2": 10, "SDE": 6, "GaussianDiffusion": 6}
    for name, sample in SAMPLERS.items():
        channels = 6 if name == "GaussianDiffusion" else 3
        network = Recorder(lambda x, t, channels=channels: torch.zeros(2, channels, 4, 4, dtype=x.dtype))
        first = sample(network, noise, 6, torch.Generator().manual_seed(0))
        assert len(network.times) == calls.get(name, len(network.times))
        assert first.shape == noise.shape and first.dtype == noise.dtype and first.isfinite().all()
        assert torch.equal(sample(network, noise, 6, torch.Generator().manual_seed(0)), first)


@pytest.mark.parametrize(
    "name, steps",
    [("DPM_Solver", 0), ("ODE_heun2", 1), ("SDE", 1), ("GaussianDiffusion", 1), ("GaussianDiffusion", 1001)],
)
def test_wrong_number_of_steps(name, steps):
    with pytest.raises(ValueError, match=f"steps={steps}; expected "):
        SAMPLERS[name](None, torch.zeros(1, 2, 4, 4), steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_noise(name):
    with pytest.raises(ValueError, match="noise is torch.bfloat16"):
        SAMPLERS[name](None, torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16))


def test_network_without_variance():
    with pytest.raises(ValueError, match="network returned 2 channels; expected 4"):
        gaussian.sample(lambda x, t: x, torch.zeros(1, 2, 4, 4))


def test_without_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pip install 'dcae_fast\[ode\]'"):
        flow.ode_dopri5(None, torch.zeros(1, 2, 4, 4))
