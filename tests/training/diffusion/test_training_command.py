"""train-diffusion on the command line: recipes, option files, the estimate, errors."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import CPU, ITEMS, RECIPE, run_in, save_latents
from stand_ins import eval_diffusion, save_references, use
from torch.autograd.graph import saved_tensors_hooks
from trainings import assert_equal, weights

from dcae_fast import cli
from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.manifest import Manifest, Settings
from dcae_fast.evaluation import networks
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.diffusion_zoo import diffusion_config
from dcae_fast.models.weights import CheckpointError
from dcae_fast.training.diffusion.config import DESCRIPTIONS, RECIPES
from dcae_fast.training.diffusion.estimate import kept_bytes
from dcae_fast.training.diffusion.network import blocks_of, build_network
from dcae_fast.training.diffusion.task import train
from dcae_fast.training.engine.config import TrainingError
from dcae_fast.training.engine.parallel import apply_activation_checkpointing
from dcae_fast.training.engine.state import autocast

OPTIONS = {  # the options that give small_training.RECIPE
    "network": {"depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3},
    "autoencoder": "dc-ae-tiny",
    "num_inference_steps": 2,
    "batch": 8,
    "steps": 12,
    "lr": 1e-2,
    "warmup_steps": 5,
    "precision": "float32",
    "run": {"device": "cpu", "patch": False, "workers": 0, "log_steps": 4, "save_steps": 4, "sample_steps": 0},
}


def run(*argv) -> int:
    return cli.main(["train-diffusion", *map(str, argv)])


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_the_command_is_the_function(shared, tmp_path, capsys, suffix):
    file = tmp_path / f"options{suffix}"
    file.write_text(json.dumps(OPTIONS | {"lr": 5.0}))
    out = shared / f"command{suffix}"
    assert run("uvit-h-f64", f"@{file}", "--lr", "1e-2", "--data", shared / "latents", "--out", out) == 0
    assert_equal(weights(out), weights(shared / "whole"))
    assert f"The model is in {(out / 'model').resolve()}" in capsys.readouterr().out


def test_recipes_are_the_original_ones(tmp_path):
    """The recipes are the original's example commands, and train the models of the zoo."""
    assert RECIPES.keys() == DESCRIPTIONS.keys()
    table = {
        "uvit-h-f64": ("dc-ae-f64c128-in-1.0-uvit-h-in-512px", 2e-4, 0.03, (0.99, 0.99), 5000, "bfloat16", 1024, 5e5),
        "usit-h-f32": ("dc-ae-f32c32-in-1.0-usit-h-in-512px", 1e-4, 0, (0.99, 0.99), 5000, "bfloat16", 1024, 5e5),
        "dit-xl-f32": ("dc-ae-f32c32-in-1.0-dit-xl-in-512px", 1e-4, 0, (0.9, 0.999), 0, "float16", 256, 3e6),
        "dit-xl-f32-batch1024": ("dc-ae-f32c32-in-1.0-dit-xl-in-512px", 2e-4, 0, (0.9, 0.999), 0, "float16", 1024, 3e6),
    }
    for name, (model, *expected) in table.items():
        r = RECIPES[name]
        got = [r.lr, r.weight_decay, r.betas, r.warmup_steps, r.precision, r.batch, r.steps]
        assert got == expected and (r.ema_decay, r.network.class_dropout_prob) == (0.9999, 0.1)
        network = diffusion_config(model).network
        save_latents(tmp_path / name, 3, (network.in_channels, network.input_size, network.input_size))
        config = r.diffusion_config(LatentDataset(tmp_path / name))
        assert config == diffusion_config(model) and config.name == model


def test_the_manifest_says_whose_latents_these_are(tmp_path):
    save_latents(tmp_path, 6)
    settings = Settings("someone/else", "float32", 64, 0.25, "npy", "", (64, 2, 2))
    Manifest(settings, ("class0", "class1", "class2"), latents=6).save(tmp_path)
    config = RECIPE.diffusion_config(LatentDataset(tmp_path))
    assert (config.autoencoder, config.scaling_factor) == ("someone/else", 0.25)


def test_dry_run(shared, tmp_path, capsys):
    file = tmp_path / "options.json"
    file.write_text(json.dumps(OPTIONS))
    assert run("uvit-h-f64", f"@{file}", "--data", shared / "latents", "--out", tmp_path / "run", "--dry-run") == 0
    text = capsys.readouterr().out
    assert (
        f"{ITEMS} latents 64x2x2" in text
        and "12 steps, 1.7 epochs of 7" in text
        and "DPM_Solver, float32" in text
        and "GiB kept" in text
    )
    assert not (tmp_path / "run").exists()
    assert (
        run("uvit-h-f64", f"@{file}", "--data", shared / "latents", "--out", tmp_path, "--dry-run", "--batch", 61) == 2
    )


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_of_the_estimate(shared, precision, checkpointed):
    """The estimate equals the memory that a real forward pass stores."""
    config, batch = RECIPE.diffusion_config(LatentDataset(shared / "latents")), 20
    network, kept = build_network(config, 0, CPU), {}
    if checkpointed:
        apply_activation_checkpointing(blocks_of(network))

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    z, labels = torch.randn(batch, 64, 2, 2), torch.zeros(batch, dtype=torch.int64)
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, precision):
        out = network(z, torch.ones(batch), labels)
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    expected = sum(storage.nbytes() for storage in kept.values())
    assert kept_bytes(config, precision, checkpointed, batch) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--batch", "61"], "batch=61; expected at most 60"),
        (["--accumulate", "3"], "accumulate=3"),
        (["--num-classes", "2"], "num_classes=2"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--eval-data", "/elsewhere"], "/elsewhere"),
        (["--wandb", "project"], "dcae_fast[log]"),
        (["--tensorboard"], "dcae_fast[log]"),
    ],
)
def test_requests_that_cannot_be_met(shared, tmp_path, capsys, monkeypatch, argv, words):
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    file = tmp_path / "options.json"
    file.write_text(json.dumps(OPTIONS))
    assert run("uvit-h-f64", f"@{file}", "--data", shared / "latents", "--out", tmp_path / "run", *argv) == 2
    assert words in capsys.readouterr().err


def test_too_little_memory(shared, tmp_path, monkeypatch, capsys):
    file = tmp_path / "options.json"
    file.write_text(json.dumps(OPTIONS))
    monkeypatch.setattr(
        "dcae_fast.training.diffusion.task.take_step", lambda *_, **options: torch.empty(2**60, dtype=torch.uint8)
    )
    assert run("uvit-h-f64", f"@{file}", "--data", shared / "latents", "--out", tmp_path / "run") == 2
    assert "a part of the batch does not fit in memory; try --accumulate" in capsys.readouterr().err


def test_evaluation(shared, tmp_path, monkeypatch):
    """It computes the figures of eval-diffusion, every eval_steps and at the end, and changes no bit of the weights."""
    monkeypatch.setattr(networks, "LOADERS", use())
    file, out = tmp_path / "options.json", shared / "evaluated"
    file.write_text(json.dumps(OPTIONS))
    (out / "evaluation").mkdir(parents=True)
    (out / "evaluation" / "samples.json").write_text("left by a run that was ended")
    shutil.copy(shared / "whole" / "training.json", out)
    argv = ["--eval-samples", 33, "--eval-steps", 8, *save_references(tmp_path, "eval-")]
    assert run("uvit-h-f64", f"@{file}", "--data", shared / "latents", "--out", out, *argv) == 0
    assert_equal(weights(out), weights(shared / "whole"))
    lines = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "fid" in line]
    assert [line.pop("step") for line in lines] == [8, 12] and lines[0] != lines[1]
    assert list(lines[1]) == ["fid", "inception_score", "inception_score_std", "precision", "recall", "cmmd"]
    assert lines[1] == pytest.approx(eval_diffusion(out / "model", tmp_path, 33), rel=1e-6)
    assert not (out / "evaluation").exists()


def test_evaluations_that_cannot_be_made(shared, tmp_path, monkeypatch, capsys):
    """The error comes before the first step."""
    file, out = tmp_path / "options.json", tmp_path / "run"
    file.write_text(json.dumps(OPTIONS))
    np.save(tmp_path / "short.npy", np.zeros((5, 4), np.float32))
    fid, recall, cmmd = (tmp_path / name for name in ("fid.npz", "pr.npy", "cmmd.npy"))
    save_references(tmp_path)
    for there, argv, words in [
        (["cmmd"], ["--eval-fid", fid], networks.INCEPTION_FILE),
        ([], ["--eval-fid", tmp_path / "absent.npz"], "absent.npz"),
        ([], ["--eval-cmmd", tmp_path / "short.npy"], "--eval-cmmd: has features of length 4; expected 6"),
        ([], ["--eval-cmmd", cmmd, "--eval-samples", 0], "--eval-samples 0: expected at least 1"),
        ([], ["--eval-precision-recall", recall, "--eval-samples", 3], "--eval-samples 3: expected at least 4"),
    ]:
        monkeypatch.setattr(networks, "LOADERS", use(*there))
        assert run("uvit-h-f64", f"@{file}", "--data", shared / "latents", "--out", out, *argv) == 2
        assert words in capsys.readouterr().err and not out.exists()


def test_trackers(shared, monkeypatch):
    """They get the numbers of the log file."""
    calls = []

    class Writer:
        def __init__(self, *args, **kwargs):
            calls.append(("init", args, kwargs))

        def __getattr__(self, name):
            return lambda *args, **kwargs: calls.append((name, args, kwargs))

    module = type(sys)("stand-in")
    module.SummaryWriter, module.Image = Writer, lambda picture: picture
    module.init = lambda **kwargs: Writer("wandb", **kwargs)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(replace(RECIPE, steps=4), run_in(shared / "tracked", tensorboard=True, wandb="project", sample_steps=4), CPU)
    names = [name for name, _, _ in calls]
    assert names.count("init") == 2 and names[-2:] == ["close", "finish"]
    line = json.loads((shared / "tracked" / "log.jsonl").read_text())
    assert ("add_scalar", ("loss", line["loss"], 4), {}) in calls
    assert names.count("add_image") == 1 and names.count("log") == 2


def test_help_shows_the_recipe(capsys):
    with pytest.raises(SystemExit):
        run("dit-xl-f32", "--help")
    text = capsys.readouterr().out
    assert "--lr FLOAT" in text and "(default: 0.0001)" in text and "float16" in text


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--batch", "0"], "batch=0; expected at least 1"),
        (["--keep", "0"], "keep=0"),
        (["--num-heads", "0"], "num_heads=0"),
        (["--depth", "-2"], "depth=-2"),
        (["--hidden-size", "65"], "hidden_size=65"),
        (["--num-inference-steps", "0"], "num_inference_steps=0"),
        (["--cuda-graphs"], "cuda_graphs: expected together"),
    ],
)
def test_options_out_of_range(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit):
        run("uvit-h-f64", "--data", tmp_path, "--out", tmp_path, *argv)
    assert words in capsys.readouterr().err


def test_samples_need_the_autoencoder(shared, tmp_path, monkeypatch):
    def absent(*args, **kwargs):
        raise CheckpointError("not to be downloaded")

    monkeypatch.setattr(DCAE, "from_pretrained", absent)
    with pytest.raises(TrainingError, match="sample_steps=0 needs none.*not to be downloaded"):
        train(RECIPE, run_in(shared / "undecoded", sample_steps=5), CPU)


@pytest.mark.parametrize(
    "items, shape, words",
    [(7, (64, 2, 2), "7 latents"), (9, (64, 4, 4), r"\[64, 4, 4\]"), (2, (64, 2, 2), "other classes")],
)
def test_held_out_latents_must_be_alike(shared, tmp_path, items, shape, words):
    save_latents(tmp_path / "held-out", items, shape)
    with pytest.raises(ValueError, match=words):
        train(RECIPE, run_in(shared / f"held-out{items}", eval_data=tmp_path / "held-out"), CPU)
