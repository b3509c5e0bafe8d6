"""A training that is asked to end finishes its step and saves. A second training in the same folder is refused."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import pytest
from small_training import CPU, RECIPE, run_in
from test_training_command import OPTIONS, run
from trainings import assert_equal, weights

from dcae_fast.interruption import Interrupted
from dcae_fast.lock import LockedError
from dcae_fast.training.diffusion import task
from dcae_fast.training.diffusion.task import train
from dcae_fast.training.engine.checkpoint import Checkpoints
from dcae_fast.training.engine.log import Log


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(step, signum): sends a signal during a step, to this process and to its workers that read data."""

    def set_up(step, signum):
        taken = iter(range(1, 100))

        def step_taken(self):
            if next(taken) == step:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signum)
                os.kill(os.getpid(), signum)

        monkeypatch.setattr(Log, "step_taken", step_taken)

    return set_up


@pytest.mark.parametrize("signum, workers", [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_saved_and_resumed(shared, signal_at, signum, workers):
    run = run_in(shared / f"interrupted-{signum.name}-{workers}", workers=workers)
    signal_at(6, signum)
    with pytest.raises(Interrupted, match="ended after step 6 of 12; saved in .*/step-000000006") as caught:
        train(RECIPE, run, CPU)
    assert caught.value.signum == signum
    assert (run.out / "checkpoints" / "latest.txt").read_text() == "step-000000006\n"
    assert not (run.out / ".lock").exists() and not (run.out / "model").exists()
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))


def test_in_the_last_step(shared, signal_at):
    """The training is complete and ends without an error."""
    run = run_in(shared / "interrupted-last")
    signal_at(12, signal.SIGTERM)
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))


def test_while_a_checkpoint_is_written(shared, monkeypatch):
    run, save = run_in(shared / "interrupted-saving"), Checkpoints.save

    def interrupted_save(self, state):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, state)

    monkeypatch.setattr(Checkpoints, "save", interrupted_save)
    with pytest.raises(Interrupted, match="after step 5"):
        train(RECIPE, run, CPU)
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_exit_status(shared, tmp_path, signal_at, capsys, signum):
    file = tmp_path / "options.json"
    file.write_text(json.dumps(OPTIONS))
    signal_at(2, signum)
    status = run("uvit-h-f64", f"@{file}", "--data", shared / "latents", "--out", tmp_path / "run")
    assert status == 128 + signum
    line = f"dcae-fast: ended after step 2 of 12; saved in {tmp_path}/run/checkpoints/step-000000002"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_before_the_first_step(shared, monkeypatch):
    """Nothing is saved, and the next attempt can begin."""
    run = run_in(shared / "interrupted-early")

    def interrupted(*_):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(task, "initial_state", interrupted)
        with pytest.raises(Interrupted):
            train(RECIPE, run, CPU)
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))


def test_two_trainings_in_one_folder(shared, lock_holder):
    run = run_in(shared / "held")
    holder = lock_holder(run.out)
    with pytest.raises(LockedError, match=f"/held is in use by process {holder} "):
        train(RECIPE, run, CPU)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    train(replace(RECIPE, steps=1), run, CPU)
