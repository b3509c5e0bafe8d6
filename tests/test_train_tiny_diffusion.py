"""The training of the tiny diffusion model: pictures, classifier, and a rehearsal of the complete program."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcae_fast import cli
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models import diffusion_zoo
from dcae_fast.models.diffusion_zoo import TINY

pytest.importorskip("sklearn", reason="the digits are scikit-learn's: pip install 'dcae_fast[train]'")
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples")
        yield


def test_pictures():
    from tiny_digits import Digits, Judge

    torch.manual_seed(0)
    digits, held_out = Digits(64, CPU), Digits(64, CPU, held_out=True)
    assert (len(digits.labels), len(held_out.labels)) == (1437, 360)
    x, labels = digits.draw(50)
    assert x.shape == (50, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    assert labels.shape == (50,) and labels.unique().tolist() == list(range(10))
    covered = torch.from_numpy(Judge.ink(x)).mean(dim=1)
    assert 0.05 < covered.min() and covered.max() < 0.6


def test_judge():
    from tiny_digits import Digits, Judge

    torch.manual_seed(0)
    judge = Judge(Digits(64, CPU), batches=6)
    x, labels = Digits(64, CPU, held_out=True).draw(200)
    assert judge.accuracy(x, labels) > 0.8
    assert judge.accuracy(x, (labels + 1) % 10) < 0.1


def test_training_reduces_the_loss():
    import train_tiny_diffusion as program

    torch.manual_seed(0)
    network = replace(program.CONFIG.network, in_channels=4, input_size=2, depth=2, hidden_size=32, num_heads=2)
    latents, labels = torch.randn(1, 4, 2, 2).repeat(64, 1, 1, 1), torch.zeros(64, dtype=torch.int64)
    average, steps = program.train_transformer(
        replace(program.CONFIG, network=network).build(), latents, labels, batch=64, minutes=0.05
    )
    objective, noise = program.OBJECTIVES["DPM_Solver"], torch.randn(64, 4, 2, 2)
    with torch.no_grad():
        loss = objective.loss(average.eval(), latents, labels, torch.full((64,), 600), noise)
    assert steps > 20 and loss < 0.7  # an untrained network has a loss of 1


def test_the_program(tmp_path, monkeypatch):
    """With pictures of 64 pixels and a smaller network, the program writes a model that can be sampled."""
    import train_tiny_diffusion as program

    network = replace(program.CONFIG.network, input_size=2, depth=2, hidden_size=32, num_heads=2)
    monkeypatch.setattr(program, "SIZE", 64)
    monkeypatch.setattr(program, "CONFIG", replace(program.CONFIG, network=network))
    out = tmp_path / TINY
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), "--minutes", "0.005", "--device", "cpu"])
    program.main()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / f"{TINY}.png").is_file()
    card = (out / "README.md").read_text()
    assert "| samples, guidance 6 |" in card and "CC BY 4.0" in card
    model = DCAEDiffusion.from_pretrained(out)
    assert model.config.network == network and 0.2 < model.scaling_factor < 0.5
    assert model.autoencoder.spatial_compression_ratio == 32
    argv = ["--model", str(out), "--steps", "1", "--no-patch", "--device", "cpu", "--out", str(tmp_path / "grid.png")]
    assert cli.main(["sample", *argv]) == 0
    with pytest.raises(SystemExit):  # the folder exists now
        program.main()


def test_the_bundled_model_draws_the_digits():
    from tiny_digits import Digits, Judge
    from train_tiny_diffusion import draw

    torch.manual_seed(0)
    model = DCAEDiffusion.from_pretrained(TINY)
    assert sum(path.stat().st_size for path in diffusion_zoo.BUNDLED[TINY].iterdir()) <= 8_000_000
    judge = Judge(Digits(256, CPU), batches=6)
    assert judge.accuracy(*draw(model, count=2, scale=3.0, steps=15)) >= 0.7
