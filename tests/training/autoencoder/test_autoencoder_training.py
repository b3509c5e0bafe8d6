"""Training an autoencoder: recipes, frozen weights, exact resuming, and what a training writes."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_autoencoders import ADAPTIVE, CONFIG, CPU, GAN, PICTURES, recipe, run_in, train_until
from trainings import assert_equal, everything, log, weights

import dcae_fast
from dcae_fast.evaluation import networks
from dcae_fast.fast import layout
from dcae_fast.images import demo_photograph
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.training.autoencoder.config import RECIPES, Adversarial
from dcae_fast.training.autoencoder.network import PartlyTrained, begins_with
from dcae_fast.training.autoencoder.step import CRITIC, NAME
from dcae_fast.training.autoencoder.task import train
from dcae_fast.training.engine.config import TrainingError


@pytest.mark.parametrize("model", ["model", "batch-norm"])
@pytest.mark.parametrize("name", RECIPES)
def test_only_the_chosen_weights_change(shared, name, model):
    """Nor do the statistics of a frozen batch norm. Frozen parameters have no state in the optimizer."""
    chosen = recipe(shared, name, model, ema_decay=None)
    state = train_until(3, chosen, run_in(shared / f"{name}-{model}"))
    before, after = DCAE.from_pretrained(shared / model).state_dict(), state.networks[NAME].network.state_dict()
    parameters = dict(state.networks[NAME].network.named_parameters())
    for key, value in before.items():
        of_module = [p for other, p in parameters.items() if other.rpartition(".")[0] == key.rpartition(".")[0]]
        trains = any(p.requires_grad for p in of_module)
        assert trains == any(begins_with(key, prefix) for prefix in chosen.train)
        assert trains == (not torch.equal(value, after[key])), key
    optimized = {id(p) for group in state.networks[NAME].optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in parameters.values() if p.requires_grad}


@pytest.mark.parametrize("name", ["latent-adaptation", "local-refinement", "decoder"])
def test_what_lies_before_the_trained_modules_keeps_nothing(shared, name):
    """It runs without autograd."""
    state = train_until(0, recipe(shared, name), run_in(shared / f"{name}-kept"))
    network, seen = state.networks[NAME].network, []
    for block in [*network.encoder.stages[1].op_list, *network.decoder.stages[2].op_list]:
        block.register_forward_hook(lambda module, x, y: seen.append((torch.is_grad_enabled(), y.requires_grad)))
    assert network(torch.zeros(1, 3, 32, 32)).requires_grad
    blocks = len(network.encoder.stages[1].op_list)
    assert set(seen[:blocks]) == {(False, False)}
    assert set(seen[blocks:]) == {(name != "local-refinement",) * 2}


@pytest.mark.parametrize("channels", [(), (4, 8)], ids=["fixed", "adaptive"])
def test_memory_formats_change_once(monkeypatch, channels):
    """Contiguous weights and pictures give the same results and gradients as without `patch`, also contiguous."""
    torch.manual_seed(0)
    network, x = PartlyTrained(ADAPTIVE if channels else CONFIG), torch.randn(1, 3, 16, 16)
    network.choose(("decoder",))
    expected = network(x, channels)
    gradients = torch.autograd.grad(expected.square().sum(), list(network.decoder.parameters()))
    dcae_fast.patch(network, cuda_graphs=False)
    changes, change = [], layout.layout_of
    monkeypatch.setattr(layout, "layout_of", lambda *args: changes.append(args) or change(*args))
    y = network(x, channels)
    assert y.is_contiguous() and not changes
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(y.square().sum(), list(network.decoder.parameters()))
    for gradient, wanted in zip(found, gradients, strict=True):
        assert (gradient - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6


def test_training_reconstructs_better(shared):
    """The folder of the result has both layouts, a card and examples; the log has each loss."""
    run = run_in(shared / "full", sample_steps=4, eval_steps=5, eval_data=shared / "pictures", licence="cc0-1.0")
    out = train(recipe(shared, "full", steps=20, ema_decay=None), run, CPU)
    model = DCAE.from_pretrained(out)
    assert model.scaling_factor != 0.5
    assert_equal(model.state_dict(), DCAE.from_pretrained(run.out / "model-diffusers").state_dict())
    lines = log(run.out)
    evaluations = [line for line in lines if "psnr" in line]
    assert [line["step"] for line in evaluations] == [5, 10, 15, 20]
    assert evaluations[-1]["psnr"] > evaluations[0]["psnr"] and {"ssim", "rfid", "latent_rms"} <= evaluations[0].keys()
    assert evaluations[-1]["latent_rms"] * model.scaling_factor == pytest.approx(1, rel=1e-2)
    card = (out / "README.md").read_text()
    assert "license: cc0-1.0" in card and f"of held-out photographs ({PICTURES}):" in card
    assert "| before |" in card and "| trained |" in card and "| losses | L1 |" in card
    assert (out / "examples.png").is_file() and (run.out / "samples" / "000000020.png").is_file()


def test_the_bundled_photograph(tmp_path):
    """A random model of a known configuration; one picture is enough for a batch of several crops."""
    chosen = replace(
        RECIPES["full"], model="dc-ae-tiny", resolution=32, batch=2, steps=1, perceptual="none", precision="float32"
    )
    run = replace(run_in(tmp_path / "run"), data=demo_photograph().parent)
    out = train(chosen, run, CPU)
    assert DCAE.from_pretrained(out).config.latent_channels == 64


def test_continuing_another_training(shared):
    first = run_in(shared / "first")
    with pytest.raises(TrainingError, match="first: this training has not ended"):
        train_until(2, recipe(shared, "decoder"), first)
        train(replace(recipe(shared, "decoder"), source=str(first.out)), run_in(shared / "second"), CPU)
    train(recipe(shared, "decoder"), first, CPU)
    state = train_until(0, replace(recipe(shared), source=str(first.out)), run_in(shared / "second"))
    assert_equal(state.networks[NAME].network.state_dict(), weights(first.out))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_is_exact(shared, tmp_path, step):
    """Also of the discriminator, its optimizer and its averages; with other workers and parts of the batch too."""
    (tmp_path / "pictures").symlink_to(shared / "pictures")
    chosen = recipe(shared, model="batch-norm", train=("decoder",), lr_decay="cosine")
    whole = everything(train_until(6, chosen, run_in(tmp_path / "whole", save_steps=100)))
    assert any("lecam" in name for name in whole) and any(f"{CRITIC}.optimizer" in name for name in whole)
    train_until(step, chosen, run_in(tmp_path / "run", save_steps=1))
    state = train_until(6, chosen, run_in(tmp_path / "run", save_steps=1, workers=step % 2))
    assert_equal(everything(state), whole)


def test_each_loss_is_logged(shared):
    run = run_in(shared / "logged")
    train_until(6, recipe(shared), run)
    lines = log(run.out)
    assert {"loss", "pixel"} < lines[0].keys() and "discriminator" not in lines[0]
    wanted = {"adversarial", "adversarial_ratio", "discriminator", "discriminator_accuracy", "r1", "lecam", "lr"}
    assert wanted <= lines[1].keys() and 0 <= lines[1]["discriminator_accuracy"] <= 1


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_accumulation_and_clipping(shared, precision):
    chosen = recipe(shared, precision=precision, clip_grad=0.1)
    run = run_in(shared / f"half-{precision}", accumulate=2)
    state = train_until(4, chosen, run)
    assert all(tensor.isfinite().all() for name, tensor in everything(state).items() if tensor.is_floating_point())


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"checkpoint_activations": True}], ids=str)
def test_parts_and_checkpointed_activations_change_nothing(shared, compare, options):
    """But rounding. Only checkpointed activations leave the batches of a batch norm as they are."""
    name = "batch-norm" if "checkpoint_activations" in options else "model"
    chosen = recipe(shared, "full", name, ema_decay=None)
    expected = everything(train_until(3, chosen, run_in(shared / f"{name}-without")))
    got = everything(train_until(3, chosen, run_in(shared / f"{name}-with", **options)))
    for key, value in expected.items():
        if "optimizer" not in key and "num_batches" not in key:
            compare("eager", got[key], value, 1e-3, key)


def test_patched(shared, compare):
    """The operators and their gradients; without a GPU, Triton interprets them."""
    chosen = recipe(shared, steps=2, ema_decay=None, resolution=8, batch=1, gan=Adversarial())
    expected = everything(train_until(1, chosen, run_in(shared / "not-patched")))
    got = everything(train_until(1, chosen, run_in(shared / "patched", patch=True)))
    for key, value in expected.items():
        if "optimizer" not in key:
            compare("eager", got[key], value, 1e-4, key)


@pytest.mark.parametrize("gan", [Adversarial(), replace(GAN, gan_start=0)], ids=["without", "with"])
def test_compiled(shared, monkeypatch, compare, gan):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    name, chosen = f"gan-{gan.gan_weight}", recipe(shared, "decoder", steps=2, ema_decay=None, gan=gan)
    expected = everything(train_until(2, chosen, run_in(shared / f"{name}-uncompiled")))
    got = everything(train_until(2, chosen, run_in(shared / f"{name}-compiled", compile=True)))
    for key, value in expected.items():
        if "optimizer" not in key:
            compare("eager", got[key], value, 1e-4, key)


def test_adaptive_channels(shared, monkeypatch):
    """The loss of a step is the mean over the smallest, the largest and drawn numbers of latent channels."""
    chosen = recipe(shared, "full", "adaptive", adaptive_latent_channels=(2, 4, 6, 8))
    state = train_until(3, chosen, run_in(shared / "adapted"))
    network, x = state.networks[NAME].network.eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = network(x, (2, 6, 8)).chunk(3)
        for channels, y in zip((2, 6, 8), got, strict=True):
            torch.testing.assert_close(y, network.decode(network.encode(x, channels)))


def test_drawn_channels():
    from dcae_fast.training.autoencoder.network import draw_channels

    allowed, seen = (16, 32, 48, 64), set()
    for seed in range(20):
        drawn = draw_channels(allowed, 1, torch.Generator().manual_seed(seed))
        assert drawn[0] == 16 and drawn[-1] == 64 and len(drawn) == 3
        seen.add(drawn[1])
    assert seen == {32, 48} and draw_channels((), 1, torch.Generator()) == ()
    assert draw_channels((8,), 2, torch.Generator()) == (8,)


def test_channels_of_an_adaptive_model(shared):
    from dcae_fast.training.autoencoder.network import allowed_channels

    assert allowed_channels(RECIPES["full"], DCAE(ADAPTIVE)) == (1, 2, 3, 4, 5, 6, 7, 8)
    wide = DCAE.from_pretrained(shared / "adaptive")
    with pytest.raises(ValueError, match="adaptive_latent_channels=.*; expected numbers from 1 to 8"):
        allowed_channels(replace(RECIPES["full"], adaptive_latent_channels=(4, 16)), wide)
    with pytest.raises(ValueError, match="always have 8 channels"):
        allowed_channels(
            replace(RECIPES["full"], adaptive_latent_channels=(4,)), DCAE.from_pretrained(shared / "model")
        )


def test_held_out_pictures_that_cannot_be_measured(shared, tmp_path, capsys):
    """They are named once."""
    shutil.copytree(shared / "pictures", tmp_path / "held-out")
    (tmp_path / "held-out" / "broken.png").write_bytes(b"no picture")
    run = run_in(shared / "with-broken", eval_steps=1, eval_data=tmp_path / "held-out")
    out = train(recipe(shared, "decoder", steps=2), run, CPU)
    assert capsys.readouterr().err.count("not measured: broken.png: not a picture") == 1
    assert f"of held-out photographs ({PICTURES}):" in (out / "README.md").read_text()


def test_crops_that_are_too_small_for_a_metric(shared, capsys):
    """They are measured by the others."""
    run = run_in(shared / "small-crops", eval_steps=1)
    train_until(1, recipe(shared, "decoder", resolution=8, steps=1), run)
    assert {"psnr", "rfid"} <= log(run.out)[-1].keys() and "ssim" not in log(run.out)[-1]
    errors = capsys.readouterr().err
    assert "not measured: ssim: crops of 8 px; expected at least 11" in errors
    assert "not measured: lpips: crops of 8 px; expected at least 31" in errors


def test_crops_that_are_too_small_for_lpips(shared):
    with pytest.raises(ValueError, match="resolution=8; expected at least 16 for LPIPS, or --perceptual none"):
        train_until(1, recipe(shared, "decoder", resolution=8, perceptual="lpips"), run_in(shared / "no-lpips"))


def test_metrics_are_computed_in_float32(shared, monkeypatch):
    """In a training in bfloat16 too, of whose reconstructions they are."""
    under_autocast = []

    def features(pictures):
        under_autocast.append(torch.is_autocast_enabled("cpu"))
        return pictures.double().flatten(2).mean(2).float()

    monkeypatch.setitem(networks.LOADERS, "fid", lambda device: features)
    train_until(1, recipe(shared, "decoder", precision="bfloat16", steps=1), run_in(shared / "in-half"))
    assert under_autocast and not any(under_autocast)


def test_a_diverging_loss_replaces_no_good_checkpoint(shared):
    run = run_in(shared / "diverged")
    with pytest.raises(TrainingError, match="loss is nan in the steps up to .*; expected a finite number"):
        train(recipe(shared, "full", lr=1e30, steps=6), run, CPU)
    assert not (run.out / "checkpoints" / "latest.txt").exists()
