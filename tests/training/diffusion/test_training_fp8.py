"""Trainings whose blocks compute in 8 bit, by the operators' references: they learn, resume exactly, and agree on two
processes, with activation checkpointing, accumulation and torch.compile.
"""

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_training import CPU, RECIPE, run_in, train_until
from trainings import assert_equal, log, weights

from dcae_fast.fast import rows8
from dcae_fast.ops._library import INTERPRETED, Kernels
from dcae_fast.training.diffusion.config import RECIPES
from dcae_fast.training.diffusion.task import DiffusionTask, train
from dcae_fast.training.engine.config import TrainingError

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a CPU computes in 8 bit only where Triton is interpreted")
RANKS = 2
UVIT = replace(RECIPE, network=replace(RECIPE.network, hidden_size=64, num_heads=1), steps=4)
DIT = replace(
    UVIT,
    network=replace(UVIT.network, kind="dit"),
    **{name: getattr(RECIPES["dit-xl-f32"], name) for name in ("train_scheduler", "eval_scheduler")},
)
PRECISIONS = "fp8", "fp8-all"
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def in_8_bit(folder: Path, **options):
    return run_in(folder, **{"patch": True, "save_steps": 2, "log_steps": 1} | options)


def distance(a: dict, b: dict) -> float:
    return sum((a[key] - b[key]).square().sum() for key in a).sqrt().item()


def trained(recipe, run) -> dict[str, torch.Tensor]:
    train(recipe, run, CPU)
    return weights(run.out)


@pytest.fixture(scope="module", autouse=True)
def references():
    """Operators compute by their references, which takes a hundredth of the interpreter's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "_choose", lambda self, args: self.plain)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared, references) -> Path:
    """A folder with latents, trainings in 8 bit and in other precisions, and trainings of two processes."""
    folder = tmp_path_factory.mktemp("fp8")
    (folder / "latents").symlink_to(shared / "latents")
    torch.multiprocessing.start_processes(trainings, (folder,), RANKS, start_method="fork")
    for precision in PRECISIONS:
        train(replace(UVIT, precision=precision), in_8_bit(folder / precision), CPU)
    train(replace(UVIT, precision="float32"), run_in(folder / "float32"), CPU)
    return folder


def trainings(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    for precision in PRECISIONS:
        for parallel in ("ddp", "fsdp"):
            run = in_8_bit(folder / f"{parallel}-{precision}", parallel=parallel)
            train(replace(UVIT, precision=precision), run, CPU)
    dist.barrier()
    os._exit(0)  # destroying the gloo group of DDP may wait forever for a thread that needs the GIL


@every_precision
@pytest.mark.parametrize("recipe", [UVIT, DIT], ids=["uvit", "dit"])
def test_the_loss_decreases(folder, recipe, precision):
    out = folder / f"{recipe.network.kind}-learns-{precision}"
    train(replace(recipe, precision=precision, steps=25, warmup_steps=1, lr=3e-3), in_8_bit(out), CPU)
    losses = [line["loss"] for line in log(out)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@every_precision
def test_resuming_is_exact(folder, precision):
    recipe, out = replace(UVIT, precision=precision), folder / f"ended-{precision}"
    train_until(3, recipe, in_8_bit(out))
    assert_equal(trained(recipe, in_8_bit(out)), weights(folder / precision))


@every_precision
def test_8_bit_is_near_but_not_equal_to_float32(folder, precision):
    exact, got = weights(folder / "float32"), weights(folder / precision)
    assert got.keys() == exact.keys() and all(tensor.dtype == torch.float32 for tensor in got.values())
    start = trained(replace(UVIT, steps=0), run_in(folder / f"start-{precision}"))
    assert 0 < distance(got, exact) < 0.5 * distance(exact, start)


@every_precision
def test_activation_checkpointing_changes_nothing(folder, precision):
    run = in_8_bit(folder / f"checkpointed-{precision}", checkpoint_activations=True)
    assert_equal(trained(replace(UVIT, precision=precision), run), weights(folder / precision))


@every_precision
def test_accumulated(folder, precision):
    recipe, one = replace(UVIT, precision=precision), weights(folder / precision)
    got = trained(recipe, in_8_bit(folder / f"accumulated-{precision}", accumulate=2))
    assert distance(got, one) < 0.8 * distance(weights(folder / "float32"), one)


@every_precision
def test_compiled(folder, precision, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    got = trained(replace(UVIT, precision=precision), in_8_bit(folder / f"compiled-{precision}", compile=True))
    one = weights(folder / precision)
    assert distance(got, one) < 0.1 * distance(weights(folder / "float32"), one)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
@every_precision
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_as_one(folder, parallel, precision):
    """The same batches in one process, whose training has the settings of a run that two processes began."""
    name = f"{parallel}-{precision}"
    one = folder / f"{name}-in-one"
    one.mkdir()
    shutil.copy(folder / name / "training.json", one)
    exact, whole = weights(folder / "float32"), trained(replace(UVIT, precision=precision), in_8_bit(one))
    assert distance(weights(folder / name), whole) < 0.1 * distance(exact, whole)


@every_precision
def test_evaluations_in_8_bit_change_nothing(folder, precision):
    """Samples and the loss on held-out latents; a moving average takes the place of the weights meanwhile."""
    run = in_8_bit(folder / f"evaluated-{precision}", sample_steps=2, eval_steps=2, eval_data=folder / "latents")
    assert_equal(trained(replace(UVIT, precision=precision), run), weights(folder / precision))
    assert [0 < line["held_out_loss"] < 2 for line in log(run.out) if "held_out_loss" in line] == [True, True]
    assert (run.out / "samples" / "000000004.png").is_file()


@every_precision
def test_precisions_do_not_mix(folder, monkeypatch, precision):
    run = in_8_bit(folder / precision)
    other = {"fp8": "fp8-all", "fp8-all": "fp8"}[precision]
    with pytest.raises(TrainingError, match=f"precision {precision}, not {other}"):
        train(replace(UVIT, precision=other), run, CPU)
    with pytest.raises(TrainingError, match="products in 8 bit, not None"):
        train(replace(UVIT, precision="bfloat16"), run, CPU)
    monkeypatch.setattr(rows8, "runs_on", lambda device: False)
    with pytest.raises(TrainingError, match="products in 8 bit, not in bfloat16"):
        train(replace(UVIT, precision=precision), run, CPU)


def test_int8_is_refused():
    with pytest.raises(
        ValueError, match="precision='int8' is for inference only; expected one of \\('fp8', 'fp8-all'\\)"
    ):
        replace(UVIT, precision="int8")


def test_a_device_without_8_bit(folder, monkeypatch, capsys):
    monkeypatch.setattr(rows8, "runs_on", lambda device: False)
    got = trained(replace(UVIT, precision="fp8"), in_8_bit(folder / "without"))
    assert "fp8 needs a Hopper GPU: on this device the training computes in bfloat16" in capsys.readouterr().err
    assert_equal(got, trained(replace(UVIT, precision="bfloat16"), in_8_bit(folder / "bfloat16")))


def test_8_bit_needs_patch(folder):
    with pytest.raises(ValueError, match="precision='fp8': expected together with patch"):
        DiffusionTask(replace(UVIT, precision="fp8"), run_in(folder / "unpatched"), CPU)
