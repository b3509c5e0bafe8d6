"""Two processes, with DDP or FSDP2, against one: the same batches, and the same weights up to rounding."""

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_training import CPU, RECIPE, run_in, train_until
from stand_ins import eval_diffusion, save_references, use
from trainings import assert_equal, weights

from dcae_fast import distributed
from dcae_fast.evaluation import networks
from dcae_fast.evaluation.generation import References
from dcae_fast.interruption import Interrupted
from dcae_fast.training.diffusion.config import DiffusionRun
from dcae_fast.training.diffusion.evaluation import Comparison
from dcae_fast.training.diffusion.task import DiffusionTask, train
from dcae_fast.training.engine.loop import Training

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
RANKS = 2
SAMPLES = 12
ROUNDING = 1e-4
SHORT = replace(RECIPE, steps=3)
HALF = {precision: replace(SHORT, precision=precision) for precision in ("bfloat16", "float16")}


def trainings(rank: int, folder: Path) -> None:
    """Runs in each process: one training after another."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    torch.compile = partial(torch.compile, backend="aot_eager")
    networks.LOADERS.update(use())
    references = References.load(*(folder / name for name in ("fid.npz", "pr.npy", "cmmd.npy")))
    train(RECIPE, run_in(folder / "ddp", accumulate=2), CPU)
    train(RECIPE, run_in(folder / "ddp-alone"), CPU)
    train(RECIPE, run_in(folder / "fsdp", parallel="fsdp", sample_steps=12, checkpoint_activations=True), CPU)
    train_until(6, RECIPE, run_in(folder / "fsdp-ended", parallel="fsdp"))
    distributed.barrier()
    if distributed.is_main():
        shutil.copytree(folder / "fsdp-ended", folder / "fsdp-then-one")
    distributed.barrier()
    train(RECIPE, run_in(folder / "fsdp-ended", parallel="fsdp"), CPU)
    interrupted(rank, run_in(folder / "interrupted"))
    for parallel in ("ddp", "fsdp"):
        run = run_in(folder / f"{parallel}-evaluated", parallel=parallel, eval_steps=5)
        train(RECIPE, run, CPU, Comparison(references, SAMPLES, run, CPU))
        train(RECIPE, run_in(folder / f"one-then-{parallel}", parallel=parallel, eval_data=folder / "latents"), CPU)
        for precision, recipe in HALF.items():
            train(recipe, run_in(folder / f"{parallel}-{precision}", parallel=parallel), CPU)
        train(
            SHORT,
            run_in(folder / f"{parallel}-compiled", compile=True, checkpoint_activations=True, parallel=parallel),
            CPU,
        )
    dist.barrier()
    os._exit(0)  # destroying the gloo group of DDP may wait forever for a thread that needs the GIL


def interrupted(rank: int, run: DiffusionRun) -> None:
    """One of the ranks gets SIGTERM. Both save after the same step, and the training is resumed."""
    training = Training(DiffusionTask(RECIPE, run, CPU))
    step_taken, taken = training.log.step_taken, iter(range(1, 100))

    def signalled():
        step_taken()
        if next(taken) == 5 and rank == 1:
            signal.raise_signal(signal.SIGTERM)

    training.log.step_taken = signalled
    try:
        training.run_all()
    except Interrupted as error:
        assert error.signum == signal.SIGTERM
    training.log.close()
    assert training.state.step == 6
    train(RECIPE, run, CPU)


@pytest.fixture(scope="module")
def folder(shared) -> Path:
    """The folder `shared` with the trainings of two processes."""
    for parallel in ("ddp", "fsdp"):
        train_until(6, RECIPE, run_in(shared / f"one-then-{parallel}"))
    save_references(shared)
    torch.multiprocessing.start_processes(trainings, (shared,), RANKS, start_method="fork")
    return shared


def in_one_process(folder: Path, name: str, recipe=RECIPE) -> dict[str, torch.Tensor]:
    """The same training as two processes began, on the same batches, but from the beginning in this process."""
    out = folder / f"{name}-in-one-{recipe.precision}"
    out.mkdir()
    settings = json.loads((folder / name / "training.json").read_text())
    assert settings["shards"] == RANKS
    settings["recipe"]["precision"] = recipe.precision
    (out / "training.json").write_text(json.dumps(settings))
    train(recipe, run_in(out), CPU)
    return weights(out)


@pytest.mark.parametrize(
    "name, recipe", [("ddp", RECIPE), ("fsdp", RECIPE), ("ddp-compiled", SHORT), ("fsdp-compiled", SHORT)]
)
def test_as_one_process(folder, name, recipe, compare):
    for key, expected in in_one_process(folder, name, recipe).items():
        compare("eager", weights(folder / name)[key], expected, ROUNDING, key)


def test_resuming_is_exact_on_two_ranks(folder):
    assert_equal(weights(folder / "fsdp-ended"), weights(folder / "fsdp"))


def test_interrupted(folder):
    assert_equal(weights(folder / "interrupted"), weights(folder / "ddp-alone"))
    assert (folder / "interrupted" / "checkpoints" / "latest.txt").read_text() == "step-000000012\n"


@pytest.mark.parametrize("parallel, same", [("ddp", "ddp-alone"), ("fsdp", "fsdp")])
def test_evaluation(folder, tmp_path, monkeypatch, parallel, same):
    """It changes no bit and gives the figures of eval-diffusion. The second rank computes the only batch of samples."""
    out = folder / f"{parallel}-evaluated"
    assert_equal(weights(out), weights(folder / same))
    lines = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "fid" in line]
    assert [line.pop("step") for line in lines] == [5, 10, 12] and not (out / "evaluation").exists()
    monkeypatch.setattr(networks, "LOADERS", use())
    assert lines[-1] == pytest.approx(eval_diffusion(out / "model", tmp_path, SAMPLES), rel=1e-6)


@pytest.mark.parametrize("name", ["one-then-ddp", "one-then-fsdp", "fsdp-then-one"])
def test_resuming_with_another_number_of_ranks(folder, name, compare):
    if name == "fsdp-then-one":
        train(RECIPE, run_in(folder / name), CPU)
    whole = folder / ("fsdp" if name == "fsdp-then-one" else "whole")
    for key, expected in weights(whole).items():
        compare("eager", weights(folder / name)[key], expected, ROUNDING, key)


def test_samples_and_losses_are_those_of_one_process(folder):
    assert (folder / "fsdp" / "samples" / "000000012.png").is_file()
    for name in ("one-then-ddp", "one-then-fsdp"):
        lines, expected = (
            [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
            for run in (name, "whole")
        )
        numbers = [[line["step"], line["loss"], line["grad_norm"]] for line in lines if "loss" in line]
        assert numbers[-1] == pytest.approx([expected[-1][key] for key in ("step", "loss", "grad_norm")], rel=ROUNDING)
        assert 0 < lines[-1]["held_out_loss"] < 1.2


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_half_precision(folder, parallel, precision):
    """Two processes differ from one by at most twice the error of half precision itself."""
    name = f"{parallel}-{precision}"
    one, exact = (in_one_process(folder, name, recipe) for recipe in (HALF[precision], SHORT))
    got = weights(folder / name)

    def distance(a, b):
        return sum((a[key] - b[key]).square().sum() for key in a).sqrt()

    assert 0 < distance(got, one) <= 2 * distance(one, exact)
