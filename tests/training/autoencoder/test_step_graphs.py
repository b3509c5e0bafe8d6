"""Steps as CUDA graphs. Without a GPU, a recording is a function that computes nothing before it is called."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_autoencoders import CPU, GAN, recipe, run_in, train_until
from trainings import assert_equal, everything

from dcae_fast.training.autoencoder import task
from dcae_fast.training.autoencoder.task import AutoencoderTask
from dcae_fast.training.engine import graphs
from dcae_fast.training.engine.graphs import StepGraphs


class Recorder:
    """In place of `graphs.Recorder`: a replay reads the inputs that are there when it is called."""

    recorded = 0

    def __init__(self, device: torch.device):
        pass

    def run(self, function: Callable) -> dict[str, torch.Tensor]:
        return function()

    def record(self, function: Callable) -> Callable:
        Recorder.recorded += 1
        return function


class Steps(StepGraphs):
    """A replay changes no options of the optimizers, as it runs no Python."""

    def __call__(self, kind, *inputs):
        with self._options_kept(capturable=False):
            return super().__call__(kind, *inputs)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(task, "StepGraphs", Steps)
    monkeypatch.setattr(graphs, "Recorder", Recorder)
    monkeypatch.setattr(Recorder, "recorded", 0)
    monkeypatch.setattr(task, "_check_graphs", lambda *_: None)


OPTIONS = [
    ("full", {}, 1),
    ("decoder", {"clip_grad": 0.1, "lr_decay": "cosine", "gan": replace(GAN, gan_start=4)}, 2),
    ("full", {"model": "adaptive", "adaptive_latent_channels": (2, 4, 6, 8)}, 2),
]


@pytest.mark.parametrize("name, options, kinds", OPTIONS, ids=["full", "gan", "adaptive"])
def test_as_without_graphs(shared, without_gpu, compare, name, options, kinds):
    """But for the rounding of the learning rate to float32. One graph for each kind of step."""
    chosen = recipe(shared, name, steps=12, **options)
    expected = everything(train_until(12, chosen, run_in(shared / f"{name}-{kinds}-no-graphs")))
    got = everything(train_until(12, chosen, run_in(shared / f"{name}-{kinds}-graphs", cuda_graphs=True)))
    assert Recorder.recorded == kinds
    for key, value in expected.items():
        compare("eager", got[key], value, 1e-4, key)


def test_resuming_with_graphs_is_exact(shared, without_gpu):
    """Whether steps are replayed or not. A checkpoint does not depend on the option."""
    chosen = recipe(shared, "full", gan=GAN, steps=10, lr_decay="cosine")
    whole = train_until(10, chosen, run_in(shared / "graphs-whole", cuda_graphs=True))
    train_until(6, chosen, run_in(shared / "graphs-resumed", cuda_graphs=True))
    resumed = train_until(10, chosen, run_in(shared / "graphs-resumed", cuda_graphs=True))
    assert_equal(everything(resumed), everything(whole))
    run = run_in(shared / "graphs-resumed")
    assert_equal(everything(train_until(10, chosen, run)), everything(whole))


def test_inputs_options_and_further_kinds(without_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    weight, seen = torch.zeros((), requires_grad=True), []
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)

    def step(kind, x, lr):
        seen.append((kind, x.tolist(), lr.item()))
        optimizer.param_groups[0]["lr"] = lr
        return {"sum": x.sum()}

    steps = Steps(step, [optimizer], CPU)
    for number in range(5):
        assert steps("a", torch.tensor([number, 1]), 0.25 * number)["sum"] == number + 1
        steps("b", torch.tensor([number, 2]), 1.0)
        assert optimizer.param_groups[0]["lr"] == 0.5
    expected = [[("a", [number, 1], 0.25 * number), ("b", [number, 2], 1.0)] for number in range(5)]
    assert seen == sum(expected, [])
    assert Recorder.recorded == 1


@pytest.mark.parametrize("options, words", [({}, "found one on cpu, and float32"), ({"precision": "float16"}, "16")])
def test_where_graphs_are_not_possible(shared, options, words):
    with pytest.raises(ValueError, match=f"cuda_graphs: expected one process on a GPU.*{words}"):
        AutoencoderTask(recipe(shared, **options), run_in(shared / "none", cuda_graphs=True), CPU)
