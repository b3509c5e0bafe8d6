"""Steps as weighted sums against the updates they were made from."""

from functools import partial

import pytest
import torch

from dcae_fast.sampling import dpm_solver, flow, guided, steps

GRID = dpm_solver.grid(12)
UPDATES = {
    **{f"order {k}": (partial(dpm_solver.update, points=GRID, i=4, order=k), 0) for k in (1, 2, 3)},
    "last": (partial(dpm_solver.update, points=GRID, i=9, order=3), 0),
    "heun": (partial(flow.heun, t=0.3, dt=0.1), 0),
    "euler": (partial(flow.euler, t=0.3, dt=0.1), 0),
    "euler_maruyama": (partial(flow.euler_maruyama, t=0.3, dt=0.1), 1),
}


def network(x: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
    return (x * 1.3 + t).sin()


@pytest.mark.parametrize("update, noises", UPDATES.values(), ids=UPDATES)
def test_a_step_is_its_update(update, noises):
    x, *noise = torch.randn(1 + noises, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (step,) = steps.linear_steps([update], x, noises)
    times = []
    expected = update(lambda x, t: times.append(t) or network(x, t), x, *noise)
    torch.testing.assert_close(steps.run(network, step, x, *noise), expected, atol=1e-12, rtol=1e-12)
    assert step.times == tuple(times) and step.numbers.shape == (len(times), 1 + noises + len(times))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_as_tensors_give_the_same_bits(dtype):
    x, labels = torch.randn(2, 3, 4, 4, dtype=dtype), torch.tensor([1, 2])
    step = steps.linear_steps([UPDATES["order 3"][0]], x)[0]
    guidance = guided(lambda x, t, y: (x * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1)).sin(), labels, 10, 2.0)
    times = torch.tensor(step.times, dtype=dtype).unbind()
    assert step.numbers.dtype == dtype
    assert torch.equal(step.function(guidance, x, times, step.numbers), steps.run(guidance, step, x))


def test_steps_of_several_shapes():
    updates = [update for update, noises in UPDATES.values() if not noises]
    found = steps.linear_steps(updates, torch.zeros(1))
    for step, update in zip(found, updates, strict=True):
        assert torch.equal(step.numbers, steps.linear_steps([update], torch.zeros(1))[0].numbers)
