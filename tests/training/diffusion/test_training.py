"""Trainings in this process: what they learn and write, how they resume, and that options do not change the weights."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import CPU, ITEMS, RECIPE, run_in, train_until
from trainings import assert_equal, log, weights

from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.errors import DataError, NotFiniteError
from dcae_fast.sampling import OBJECTIVES
from dcae_fast.training.diffusion import task
from dcae_fast.training.diffusion.config import Architecture
from dcae_fast.training.diffusion.draws import draw
from dcae_fast.training.diffusion.step import NAME
from dcae_fast.training.diffusion.task import DiffusionTask, train
from dcae_fast.training.engine.batches import BatchOrder
from dcae_fast.training.engine.config import TrainingError
from dcae_fast.training.engine.loop import Training

SHORT = replace(RECIPE, steps=3)


def same_numbers(one: list[dict], other: list[dict]) -> bool:
    names = ("step", "loss", "lr", "grad_norm")
    return [[line[name] for name in names] for line in one] == [[line[name] for name in names] for line in other]


def test_steps_by_the_formulas(shared, tmp_path):
    """The reference is a loop with PyTorch's AdamW, not fused, and the formula of the average."""
    task = DiffusionTask(SHORT, run_in(shared / "formulas"), CPU)
    training = Training(task)
    training.log.close()
    torch.manual_seed(SHORT.seed)
    network = task.config.build().eval()  # drops no labels
    decayed = [p for name, p in network.named_parameters() if "bias" not in name and name != "norm.weight"]
    others = [p for name, p in network.named_parameters() if "bias" in name or name == "norm.weight"]
    groups = [{"params": decayed, "weight_decay": 0.03}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.99, 0.99), foreach=False)
    average = {name: p.detach().clone() for name, p in network.named_parameters()}
    for step, indices in enumerate(BatchOrder(ITEMS, 8, 1, 0, range(3), 0, 1), start=1):
        z = torch.stack([task.data[i][0] for i in indices])
        draws = draw(task.config, 8, range(8), 0, step - 1, CPU)
        labels = torch.tensor([3 if gone else task.data[i][1] for i, gone in zip(indices, draws.dropped, strict=True)])
        loss = OBJECTIVES["DPM_Solver"].loss(network, z, labels, draws.t, draws.noise)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 6.4e-6 + (1e-2 - 6.4e-6) * step / 5
        optimizer.step()
        optimizer.zero_grad()
        for name, p in network.named_parameters():
            average[name] += (1 - 0.9999 * (1 - np.exp(-step / 2000))) * (p.detach() - average[name])
    training.run_all()
    for name, p in training.state.exported.named_parameters():
        torch.testing.assert_close(p, network.get_parameter(name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(training.state.average.average[name], average[name], rtol=1e-5, atol=1e-6)


def test_what_a_training_writes(shared):
    lines = log(shared / "whole")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert lines[0]["lr"] == pytest.approx(6.4e-6 + (1e-2 - 6.4e-6) * 4 / 5) and lines[-1]["lr"] == 1e-2
    assert lines[-1]["loss"] < 0.97 * lines[0]["loss"]
    assert all(line["images_per_second"] > 0 and 0 <= line["waited"] <= 1 for line in lines)
    checkpoints = shared / "whole" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"latest.txt", "step-000000008", "step-000000012"}
    assert (checkpoints / "latest.txt").read_text() == "step-000000012\n"
    model = DCAEDiffusion.from_pretrained(shared / "whole" / "model")
    assert model.config.network.class_dropout_prob == 0.1 and model.config.autoencoder == "dc-ae-tiny"
    averaged = DCAEDiffusion.from_pretrained(checkpoints / "step-000000012" / "ema")
    assert_equal(model.diffusion_model.state_dict(), averaged.diffusion_model.state_dict())
    labels = torch.tensor([0, 1, 2])
    assert model.decode(model.generate(labels, cfg_scale=2.0)).shape == (3, 3, 64, 64)


def test_resuming_is_exact_from_any_step(shared):
    """A run may end at any step, also before its first checkpoint or right after one. The log has each line once."""
    for step in (2, 6, 8, 11):
        run = run_in(shared / f"ended{step}")
        train_until(step, RECIPE, run)
        assert not (run.out / "model").exists()
        train(RECIPE, run, CPU)
        assert_equal(weights(run.out), weights(shared / "whole"))
        assert same_numbers(log(run.out)[-1:], log(shared / "whole")[-1:])
        assert [line["step"] for line in log(run.out)] == [4, 8, 12]


def test_more_steps(shared):
    run = run_in(shared / "more")
    train(replace(RECIPE, steps=8), run, CPU)
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))
    before = (run.out / "model" / "model.safetensors").stat().st_mtime_ns
    train(RECIPE, run, CPU)  # nothing left to do
    assert_equal(weights(run.out), weights(shared / "whole"))
    assert (run.out / "model" / "model.safetensors").stat().st_mtime_ns > before


def test_more_steps_of_a_decaying_learning_rate(shared):
    """It continues on the curve of the new number of steps. With the same number, resuming is exact."""
    decaying, folder = replace(RECIPE, lr_decay="cosine"), shared / "decaying"
    train(decaying, run_in(folder), CPU)
    train_until(6, decaying, run_in(shared / "decaying-ended"))
    train(decaying, run_in(shared / "decaying-ended"), CPU)
    assert_equal(weights(shared / "decaying-ended"), weights(folder))
    train(replace(decaying, steps=19), run_in(folder), CPU)
    rates = {line["step"]: line["lr"] for line in log(folder)}
    assert rates[12] == 0 and rates[16] == pytest.approx(1e-2 * (1 + np.cos(np.pi * 11 / 14)) / 2) and rates[19] == 0


@pytest.mark.parametrize("options", [{"workers": 2}, {"checkpoint_activations": True}], ids=str)
def test_options_that_alter_no_bit(shared, options):
    run = run_in(shared / "-".join(options), **options)
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))


def test_patched(shared, compare):
    recipe = replace(RECIPE, steps=1)
    plain, patched = run_in(shared / "unpatched"), run_in(shared / "patched", patch=True)
    train(recipe, plain, CPU)
    train(recipe, patched, CPU)
    for name, expected in weights(plain.out).items():
        compare("eager", weights(patched.out)[name], expected, 1e-4, name)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation(shared, accumulate, compare):
    run = run_in(shared / f"accumulate{accumulate}", accumulate=accumulate)
    train(RECIPE, run, CPU)
    for name, expected in weights(shared / "whole").items():
        compare("eager", weights(run.out)[name], expected, 1e-4, name)


def test_compiled(shared, compare, monkeypatch):
    """Compilation does not rename the weights, and the average includes every step."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kw: compile(*args, **kw, backend="aot_eager"))
    run = run_in(shared / "compiled", compile=True, checkpoint_activations=True, sample_steps=12)
    train_until(7, RECIPE, run)
    train(RECIPE, run, CPU)
    for name, expected in weights(shared / "whole").items():
        compare("eager", weights(run.out)[name], expected, 1e-4, name)


@pytest.mark.gpu
@pytest.mark.parametrize("patch", [False, True])
def test_cuda_graphs(shared, compare, patch):
    """They compute what the compiled network computes, also after evaluations and when a training is resumed."""
    device, options = torch.device("cuda"), {"device": "cuda", "compile": True, "patch": patch, "sample_steps": 5}
    plain, graphs = (run_in(shared / f"graphs-{patch}-{on}", cuda_graphs=on, **options) for on in (False, True))
    train(RECIPE, plain, device)
    train_until(7, RECIPE, graphs, device)
    train(RECIPE, graphs, device)
    for name, expected in weights(plain.out).items():
        compare("eager", weights(graphs.out)[name], expected, 1e-4, name)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(shared, precision):
    recipe = replace(RECIPE, precision=precision)
    whole, ended = run_in(shared / precision), run_in(shared / f"{precision}-ended")
    train(recipe, whole, CPU)
    train_until(7, recipe, ended)
    train(recipe, ended, CPU)
    assert_equal(weights(ended.out), weights(whole.out))
    exact = log(shared / "whole")[-1]["loss"]
    assert log(whole.out)[-1]["loss"] == pytest.approx(exact, rel=0.02)


def test_float16_leaves_out_a_step_that_overflows(shared):
    recipe = replace(RECIPE, precision="float16")
    training = Training(DiffusionTask(recipe, run_in(shared / "overflow"), CPU))
    trained = training.state.networks[NAME]
    trained.scaler.load_state_dict(trained.scaler.state_dict() | {"scale": 1e30})
    before = {name: p.clone() for name, p in trained.network.named_parameters()}
    training.steps = range(1)
    training.run_all()
    training.log.close()
    assert_equal(before, dict(trained.network.named_parameters()))
    assert training.state.step == 1 and trained.scaler.get_scale() < 1e30


def norms_at_steps(run, clip) -> list[torch.Tensor]:
    """Norms of the gradients that the optimizer sees."""
    training, norms = Training(DiffusionTask(replace(SHORT, clip_grad=clip), run, CPU)), []
    training.log.close()
    trained = training.state.networks[NAME]

    def look(*_):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained.network.parameters()]))

    trained.optimizer.register_step_pre_hook(look)
    training.run_all()
    return norms


def test_clipping(shared):
    assert all(norm > 0.1 for norm in norms_at_steps(run_in(shared / "free"), None))
    assert all(norm < 1.001e-3 for norm in norms_at_steps(run_in(shared / "clipped"), 1e-3))


@pytest.mark.parametrize(
    "kind, scheduler, sampler",
    [
        ("uvit", "SiTSampler", "ODE_heun2"),
        ("dit", "SiTSampler", "SDE"),
        ("dit", "GaussianDiffusion", "GaussianDiffusion"),
    ],
)
def test_other_objectives(shared, kind, scheduler, sampler):
    recipe = replace(
        SHORT, network=replace(RECIPE.network, kind=kind), train_scheduler=scheduler, eval_scheduler=sampler
    )
    out = train(recipe, run_in(shared / f"{kind}-{scheduler}"), CPU)
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == kind and config["train_scheduler"] == scheduler
    assert config["network"].get("learn_sigma") == {"uvit": None, "dit": scheduler == "GaussianDiffusion"}[kind]


def test_without_an_average(shared):
    recipe = replace(RECIPE, ema_decay=None)
    whole, ended = run_in(shared / "plain"), run_in(shared / "plain-ended")
    train(recipe, whole, CPU)
    train_until(6, recipe, ended)
    train(recipe, ended, CPU)
    assert_equal(weights(ended.out), weights(whole.out))
    assert not (whole.out / "checkpoints" / "step-000000012" / "ema").exists()
    average, plain = weights(shared / "whole"), weights(whole.out)
    assert any(not torch.equal(average[name], plain[name]) for name in plain)


def test_samples_and_evaluation(shared, tmp_path):
    """Both use the average, change nothing, and are due after every so many steps and at the end."""
    seen = []

    def evaluate(model, step):
        assert not model.diffusion_model.training and not torch.is_grad_enabled() and step == [8, 12][len(seen)]
        seen.append({name: p.clone() for name, p in model.diffusion_model.named_parameters()})
        return {"answer": 42.0}

    run = run_in(shared / "looked", sample_steps=5, eval_steps=8, eval_data=shared / "latents")
    train(RECIPE, run, CPU, evaluate)
    result = weights(run.out)
    assert_equal(result, weights(shared / "whole"))
    assert_equal({f"diffusion_model.{name}": p for name, p in seen[-1].items()}, result)
    assert [path.name for path in sorted((run.out / "samples").iterdir())] == [
        f"{step:09d}.png" for step in (5, 10, 12)
    ]
    evaluations = [line for line in log(run.out) if "answer" in line]
    assert [line["step"] for line in evaluations] == [8, 12] and len(seen) == 2
    assert 0 < evaluations[1]["held_out_loss"] < evaluations[0]["held_out_loss"] < 1.2
    assert same_numbers([line for line in log(run.out) if "loss" in line], log(shared / "whole"))


def test_samples_that_are_not_finite(shared, monkeypatch, capsys):
    """They are not written, and the training continues."""

    def overflows(*args):
        raise NotFiniteError("NaN or infinity in latent 1")

    monkeypatch.setattr(task, "draw_samples", overflows)
    run = run_in(shared / "overflowing", sample_steps=2)
    train(replace(RECIPE, steps=2), run, CPU)
    assert "The samples after step 2 contain NaN or infinity" in capsys.readouterr().err
    assert (run.out / "model").is_dir() and not (run.out / "samples").exists()


def test_ended_in_an_evaluation(shared):
    """The resumed run evaluates again, also at a step that has a checkpoint."""
    run = run_in(shared / "evaluating", eval_steps=8)

    def end(model, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, run, CPU, end)
    train(RECIPE, run, CPU, lambda model, step: {"answer": step / 2})
    assert_equal(weights(run.out), weights(shared / "whole"))
    assert [line["answer"] for line in log(run.out) if "answer" in line] == [4, 6]


def test_a_folder_of_another_training(shared):
    for recipe, words in [
        (replace(RECIPE, lr=1.0), "lr 0.01, not 1.0"),
        (replace(RECIPE, network=replace(RECIPE.network, depth=4)), "depth 2, not 4"),
    ]:
        with pytest.raises(TrainingError, match=words):
            train(recipe, run_in(shared / "whole"), CPU)


def test_other_latents(shared, tmp_path):
    shutil.copytree(shared / "latents", tmp_path / "latents")
    shutil.copytree(shared / "whole", tmp_path / "run")
    first = min(path for path in (tmp_path / "latents").iterdir() if path.is_dir())
    first.rename(first.with_name(f"{first.name}-of-another-name"))
    with pytest.raises(TrainingError, match="a training with other classes; resume it with the same data"):
        train(RECIPE, replace(run_in(tmp_path / "run"), data=tmp_path / "latents"), CPU)


def test_an_attempt_that_failed_locks_no_folder(shared):
    run = run_in(shared / "attempts")
    for attempt in ({"batch": 61}, {"lr": 1e30, "warmup_steps": 0}):
        with pytest.raises((TrainingError, ValueError)):
            train(replace(RECIPE, **attempt), run, CPU)
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))


def test_a_folder_of_something_else(tmp_path, shared):
    (tmp_path / "a.png").touch()
    with pytest.raises(TrainingError, match="not empty"):
        train(RECIPE, replace(run_in(tmp_path), data=shared / "latents"), CPU)


def test_back_to_an_earlier_checkpoint(shared):
    run = run_in(shared / "taken-back")
    shutil.copytree(shared / "whole", run.out)
    (run.out / "checkpoints" / "latest.txt").write_text("step-000000008\n")
    train(RECIPE, run, CPU)
    assert_equal(weights(run.out), weights(shared / "whole"))
    assert [line["step"] for line in log(run.out)] == [4, 8, 12]


def test_fewer_steps_than_were_taken(shared):
    with pytest.raises(TrainingError, match="steps=8; expected at least 12, the steps .*/whole has taken"):
        train(replace(RECIPE, steps=8), run_in(shared / "whole"), CPU)


def test_a_loss_that_is_not_finite(shared):
    with pytest.raises(TrainingError, match="loss is nan in the steps up to 4"):
        train(replace(RECIPE, lr=1e30, warmup_steps=0), run_in(shared / "diverged"), CPU)
    rare = run_in(shared / "diverged-unseen", log_steps=12, save_steps=3)
    with pytest.raises(TrainingError, match="loss is nan in the steps up to 3"):
        train(replace(RECIPE, lr=1e30, warmup_steps=0), rare, CPU)
    assert not (rare.out / "checkpoints").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"batch": 61}, "at most 60"),
        ({"network": Architecture(kind="uvit", num_classes=2)}, "expected at least 3, the number of classes"),
        ({"autoencoder": "dc-ae-nothing"}, "dc-ae-nothing"),
        ({"autoencoder": "dc-ae-f32c32-in-1.0"}, "latents of 64 channels"),
        ({"clip_grad": 0.0}, "clip_grad=0.0; expected more than 0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0; expected between 0 and 1"),
        ({"eval_scheduler": "SDE"}, "eval_scheduler='SDE'; expected one of DPM_Solver"),
    ],
    ids=str,
)
def test_recipes_that_do_not_fit(shared, change, words):
    with pytest.raises(ValueError, match=words):
        train(replace(RECIPE, **change), run_in(shared / "unfit"), CPU)


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError):
        train(RECIPE, run_in(tmp_path / "run"), CPU)
