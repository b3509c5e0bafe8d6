"""train-autoencoder on the command line: recipes, option files, the estimate, errors."""

import json
import shutil

import pytest
import torch
from small_autoencoders import CONFIG, CPU, PICTURES, recipe, run_in
from torch.autograd.graph import saved_tensors_hooks

from dcae_fast import cli
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.training.autoencoder.config import DESCRIPTIONS, RECIPES
from dcae_fast.training.autoencoder.estimate import work_of_a_part
from dcae_fast.training.autoencoder.network import load_source
from dcae_fast.training.autoencoder.task import train
from dcae_fast.training.engine.parallel import apply_activation_checkpointing

OPTIONS = {
    "resolution": 32,
    "batch": 4,
    "steps": 2,
    "perceptual": "none",
    "precision": "float32",
    "gan": {"discriminator_width": 4},
    "run": {"device": "cpu", "patch": False, "workers": 0, "log_steps": 1, "sample_steps": 0},
}


@pytest.fixture
def run(shared, tmp_path):
    """run(recipe, *options): the exit status of the command, with `OPTIONS` from a file."""
    file = tmp_path / "options.json"
    file.write_text(json.dumps(OPTIONS))

    def command(name, *argv) -> int:
        data = ["--data", shared / "pictures", "--out", tmp_path / "run"]
        return cli.main(list(map(str, ["train-autoencoder", name, f"@{file}", *data, *argv])))

    return command


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe(shared, tmp_path, run, capsys, name):
    assert run(name, "--from", shared / "model") == 0
    assert f"The model is in {(tmp_path / 'run' / 'model').resolve()}" in capsys.readouterr().out
    assert DCAE.from_pretrained(tmp_path / "run" / "model").config.latent_channels == CONFIG.latent_channels


def test_recipes():
    """The numbers that were reported for the three phases."""
    assert RECIPES.keys() == DESCRIPTIONS.keys()
    table = {
        "full": (("encoder", "decoder"), 256, 6.4e-5, (0.9, 0.999), 0.1, 0.0),
        "latent-adaptation": (("encoder.project_out", "decoder.project_in"), 512, 1.6e-5, (0.9, 0.999), 1e-3, 0.0),
        "local-refinement": (("decoder.project_out",), 256, 5.4e-5, (0.5, 0.9), 0.1, 0.1),
        "decoder": (("decoder",), 256, 1.6e-5, (0.9, 0.999), 1e-3, 0.0),
    }
    for name, expected in table.items():
        r = RECIPES[name]
        assert (r.train, r.resolution, r.lr, r.betas, r.weight_decay, r.gan.gan_weight) == expected
        assert (r.pixel, r.perceptual, r.perceptual_weight) == ("l1", "lpips", 0.25)


@pytest.mark.parametrize("name", RECIPES)
def test_dry_run(shared, tmp_path, run, capsys, name):
    assert run(name, "--from", shared / "adaptive", "--dry-run") == 0
    text = capsys.readouterr().out
    assert f"{PICTURES} pictures, and 0 skipped" in text and "GiB kept" in text and "TFLOP per step" in text
    assert "channels  1, 2, 3, 4, 5, 6, 7, 8 of the latent" in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_memory_of_the_estimate(shared, name, checkpointed):
    """The estimate equals the memory that a real forward pass stores."""
    chosen, kept = recipe(shared, name), {}
    network = load_source(chosen)
    if checkpointed:
        from dcae_fast.training.autoencoder.network import with_gradient

        apply_activation_checkpointing(with_gradient(network))

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = network(torch.randn(5, 3, 32, 32))
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    expected = sum(storage.nbytes() for storage in kept.values())
    work = work_of_a_part(CONFIG, chosen, (), checkpointed, 5)
    assert work.kept == pytest.approx(expected, rel=0.01) and work.flops > 0


def test_frozen_weights_cost_no_gradient(shared):
    flops = {name: work_of_a_part(CONFIG, recipe(shared, name), (), False, 2).flops for name in RECIPES}
    assert flops["local-refinement"] < flops["decoder"] < flops["full"]


@pytest.mark.parametrize(
    "name, argv, words",
    [
        ("decoder", ["--train", "decoder.project_on"], "no parameter's name begins with decoder.project_on; expected"),
        ("decoder", ["--from", "/nowhere/model"], "/nowhere/model"),
        ("decoder", ["--model", "dc-ae-tiny"], "expected either --from"),
        ("full", ["--resolution", 30], "resolution=30; expected a multiple of 4"),
        ("full", ["--data", "/nowhere"], "/nowhere: expected a folder"),
        ("full", ["--eval-data", "/elsewhere"], "/elsewhere: expected a folder"),
        ("full", ["--accumulate", 3], "batch=4; expected a multiple of 3"),
        ("full", ["--adaptive-latent-channels", 4], "the latents of this model always have 8 channels"),
        ("full", ["--device", "cuda:99"], "cuda:99"),
        ("local-refinement", ["--resolution", 16], "resolution=16; expected at least 24 for a discriminator"),
        ("local-refinement", ["--train", "decoder.project_in"], "--no-gan-adaptive"),
    ],
)
def test_requests_that_cannot_be_met(shared, run, capsys, name, argv, words):
    assert run(name, "--from", shared / "model", *argv) == 2
    assert words in capsys.readouterr().err


def test_from_nothing(run, capsys):
    assert run("decoder") == 2
    assert "expected either --from" in capsys.readouterr().err
    assert run("decoder", "--model", "dc-ae-tiny") == 2
    assert "frozen parameters would keep random weights; expected --from" in capsys.readouterr().err


def test_lpips_without_weights(shared, run, capsys, monkeypatch):
    monkeypatch.setattr("dcae_fast.training.autoencoder.losses.HEADS", (("torchmetrics", "absent.pth"),))
    assert run("full", "--from", shared / "model", "--perceptual", "lpips") == 2
    assert "absent.pth" in capsys.readouterr().err


def test_other_photographs_on_resume(shared, tmp_path, capsys, run):
    shutil.copytree(shared / "pictures", tmp_path / "pictures")
    train(recipe(shared, "decoder"), run_in(tmp_path / "run"), CPU)
    (tmp_path / "pictures" / "3.png").unlink()
    argv = ["decoder", "--from", shared / "model", "--data", tmp_path / "pictures", "--steps", 8, "--lr", 1e-3]
    assert run(*argv) == 2
    assert f"contains a training with photographs {PICTURES}, not {PICTURES - 1}" in capsys.readouterr().err
