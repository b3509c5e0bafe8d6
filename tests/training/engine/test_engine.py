"""A training of two networks with two optimizers: resumed to the bit, one of the networks averaged and exported."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from trainings import assert_equal, everything, log
from two_networks import BEGINS, RECIPE, TwoNetworks, exported, run_in, train_until

from dcae_fast.interruption import Interrupted
from dcae_fast.training.engine.config import TrainingError
from dcae_fast.training.engine.log import Log
from dcae_fast.training.engine.loop import train
from dcae_fast.training.engine.settings import shards_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The state of a training that saves no checkpoint before its last step."""
    return everything(train_until(RECIPE.steps, tmp_path_factory.mktemp("whole") / "run", save_steps=100))


@pytest.mark.parametrize("step", [2, 5, 8, 11])
def test_resuming_is_exact(tmp_path, whole, step):
    """Of both networks, their optimizers and gradient scalers, and the average."""
    train_until(step, tmp_path / "run")
    state = train_until(RECIPE.steps, tmp_path / "run")
    assert state.step == RECIPE.steps
    assert_equal(everything(state), whole)


@pytest.mark.parametrize("step", [1, BEGINS, 3])
def test_saving_alters_nothing(tmp_path, whole, step):
    """Also while the discriminator's optimizer has taken no step."""
    train_until(step, tmp_path / "run", save_steps=1)
    assert_equal(everything(train_until(RECIPE.steps, tmp_path / "run", save_steps=1)), whole)


def test_both_optimizers_are_restored(tmp_path):
    before = everything(train_until(8, tmp_path / "run"))
    restored = train_until(8, tmp_path / "run")
    assert_equal(everything(restored), before)
    for name, steps in {"generator": 8, "discriminator": 8 - BEGINS}.items():
        trained = restored.networks[name]
        assert {values["step"].item() for values in trained.optimizer.state.values()} == {steps}
        assert trained.scaler.get_scale() == 16 * 2 ** (steps // 3)


def test_the_average_of_one_network_is_exported(finished, whole):
    """With the buffers of the network, which are not averaged."""
    model = exported(finished / "model")
    assert_equal(model, exported(finished / "checkpoints" / "step-000000012" / "ema"))
    averages = {name: whole[f"average.{name}"] for name in model if f"average.{name}" in whole}
    buffers = {name: whole[f"generator.{name}"] for name in model if name not in averages}
    assert_equal(model, {name: (averages | buffers)[name] for name in model})
    assert set(buffers) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not torch.equal(averages["0.weight"], whole["generator.0.weight"])


def test_interrupted(tmp_path, monkeypatch, whole):
    taken = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(Log, "step_taken", lambda self: next(taken) == 6 and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="ended after step 6 of 12; saved in .*/step-000000006"):
            train(TwoNetworks(RECIPE, run_in(tmp_path / "run")))
    assert_equal(everything(train_until(RECIPE.steps, tmp_path / "run")), whole)


def test_each_loss_is_logged(finished):
    """As its mean over the steps that have it."""
    lines = [line for line in log(finished) if "waited" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert list(line) == [
            "step", "reconstruction", "adversarial", "discriminator", "grad_norm", "images_per_second", "waited",
        ]  # fmt: skip
    assert lines[0]["discriminator"] == pytest.approx(2, abs=0.5)  # of two steps; the loss of a new discriminator is 2


def test_samples_and_evaluations(tmp_path, finished):
    """The task may have no picture to show. Evaluations see the average and alter nothing."""
    run = run_in(tmp_path / "run", sample_steps=5, eval_steps=6)
    train(TwoNetworks(RECIPE, run))
    assert [file.name for file in sorted((run.out / "samples").iterdir())] == ["000000010.png", "000000012.png"]
    distances = {line["step"]: line["distance"] for line in log(run.out) if "distance" in line}
    assert list(distances) == [6, 12] and distances[12] < distances[6]
    assert_equal(exported(run.out / "model"), exported(finished / "model"))


def test_a_folder_of_other_data(tmp_path, finished):
    run = run_in(shutil.copytree(finished, tmp_path / "run"))
    with pytest.raises(TrainingError, match="contains a training with items 20, not 30"):
        train(TwoNetworks(RECIPE, run, items=30))
    with pytest.raises(TrainingError, match="contains a training with seed 0, not 1"):
        train(TwoNetworks(replace(RECIPE, seed=1), run))


def test_hashes_are_not_printed(tmp_path):
    shards_of(tmp_path, {"data": {"photographs_names": "a" * 64}}, has_begun=False)
    with pytest.raises(TrainingError, match="contains a training with other photographs names; .* same data"):
        shards_of(tmp_path, {"data": {"photographs_names": "b" * 64}}, has_begun=True)


def test_settings_of_an_earlier_version(tmp_path, finished):
    """Which has fewer options. Those that are new have their defaults."""
    run = run_in(shutil.copytree(finished, tmp_path / "run"))
    settings = json.loads((run.out / "training.json").read_text())
    del settings["recipe"]["lr_decay"]
    (run.out / "training.json").write_text(json.dumps(settings))
    train(TwoNetworks(RECIPE, run))
    with pytest.raises(TrainingError, match="contains a training with lr_decay None, not cosine"):
        train(TwoNetworks(replace(RECIPE, lr_decay="cosine"), run))


def test_a_loss_that_is_not_finite(tmp_path):
    class Diverging(TwoNetworks):
        def take_step(self, batch, logged):
            losses, numbers = super().take_step(batch, logged)
            return losses | {"adversarial": torch.tensor(float("inf"))}, numbers

    with pytest.raises(TrainingError, match="adversarial is inf in the steps up to 4; expected a finite number"):
        train(Diverging(RECIPE, run_in(tmp_path / "run")))
    assert not (tmp_path / "run" / "checkpoints").exists()
