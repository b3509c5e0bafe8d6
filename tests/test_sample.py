"""`dcae-fast sample`, in this process, with a small model of random weights."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open
from small_diffusion import DIT, FLOW, UVIT, build

from dcae_fast import cli, images
from dcae_fast import sample as sampling
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models import diffusion_zoo

LABELS = ["--labels", "3", "1", "4", "1", "5"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders with models of 10 classes and pictures of 8x8 pixels."""
    folders = tmp_path_factory.mktemp("models")
    for name, config in {"uvit": UVIT, "flow": FLOW, "dit": DIT}.items():
        build(config).save_pretrained(folders / name)
    return {path.name: str(path) for path in folders.iterdir()}


def run(model: str, out, *argv) -> int:
    return cli.main(["sample", "--model", model, "--device", "cpu", "--out", str(out), *map(str, argv)])


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_grid_of_pictures(models, tmp_path, capsys):
    """Five pictures make two columns; each picture depends on its label and position."""
    out = tmp_path / "new" / "grid.png"
    assert run(models["uvit"], out, *LABELS, "--no-patch") == 0
    model = DCAEDiffusion.from_pretrained(models["uvit"])
    labels = torch.tensor([3, 1, 4, 1, 5])
    with torch.inference_mode():
        z = model.generate(labels, cfg_scale=6.0, generator=torch.Generator().manual_seed(0))
        expected = images.to_uint8(model.decode(z))
    sheet = pixels(out)
    assert sheet.shape == (3 * 10 - 2, 2 * 10 - 2, 3)
    for i, picture in enumerate(expected):
        top, left = i // 2 * 10, i % 2 * 10
        assert np.array_equal(sheet[top : top + 8, left : left + 8], picture.permute(1, 2, 0).numpy())
    assert (sheet[8:10] == 255).all() and (sheet[20:, 10:] == 255).all()
    text = capsys.readouterr().out
    assert "Classes, row by row: 3 1; 4 1; 5" in text and str(out.resolve()) in text


def test_same_seed_same_pictures(models, tmp_path):
    for name, argv in {"a": [], "b": [], "c": ["--seed", "1"], "d": ["--cfg", "1"], "e": ["--steps", "3"]}.items():
        assert run(models["uvit"], tmp_path / f"{name}.png", *LABELS, *argv) == 0
    first = pixels(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "b.png"), first)
    assert not any(np.array_equal(pixels(tmp_path / f"{name}.png"), first) for name in "cde")


@pytest.mark.parametrize("name, sampler, steps", [("uvit", "DPM_Solver", 6), ("flow", "SDE", 4), ("dit", None, 5)])
def test_latents(models, tmp_path, name, sampler, steps):
    path = tmp_path / "new" / "latents.safetensors"
    argv = [] if sampler is None else ["--sampler", sampler]
    assert run(models[name], tmp_path / "grid.png", *LABELS, *argv, "--steps", steps, "--latents", path) == 0
    tensors = load_file(path)
    assert tensors["latents"].shape == (5, 8, 4, 4) and tensors["labels"].tolist() == [3, 1, 4, 1, 5]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "model": models[name],
        "scaled": "true",
        "cfg": "6.0",
        "seed": "0",
        "sampler": sampler or "GaussianDiffusion",
        "steps": str(steps),
    }
    model = DCAEDiffusion.from_pretrained(models[name])
    sheet = np.asarray(images.grid(sampling.decode(model, tensors["latents"]), 2))
    assert np.abs(sheet.astype(int) - pixels(tmp_path / "grid.png")).max() <= 1


def test_default_labels(models, tmp_path, capsys):
    assert run(models["uvit"], tmp_path / "grid.png", "--steps", "1") == 0
    assert "0 1 2 3; 4 5 6 7; 8 9 0 1; 2 3 4 5" in capsys.readouterr().out
    assert pixels(tmp_path / "grid.png").shape == (38, 38, 3)
    assert sampling.default_labels(1000)[:3] == (279, 333, 979) and len(sampling.default_labels(1000)) == 16


def test_many_pictures_are_decoded_in_parts(models):
    model, sizes = build(), []
    model.autoencoder.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    z = torch.randn(19, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures = sampling.decode(model, z)
    assert sizes == [8, 8, 3] and pictures.dtype == torch.uint8 and pictures.shape == (19, 3, 8, 8)


def test_half_precision(models, tmp_path):
    """With autocast and a bfloat16 autoencoder the pictures are nearly the same."""
    for dtype in ("float32", "bfloat16"):
        assert run(models["uvit"], tmp_path / f"{dtype}.png", *LABELS, "--cfg", "1", "--dtype", dtype) == 0
    difference = pixels(tmp_path / "float32.png").astype(int) - pixels(tmp_path / "bfloat16.png")
    assert 0 < np.abs(difference).mean() < 4


def test_models_by_name(models, tmp_path, monkeypatch):
    monkeypatch.setitem(diffusion_zoo.BUNDLED, diffusion_zoo.TINY, Path(models["uvit"]))
    out = tmp_path / "grid.png"
    assert cli.main(["sample", "--device", "cpu", "--steps", "1", "--out", str(out)]) == 0
    assert out.is_file()


@pytest.mark.parametrize("name", diffusion_zoo.DIFFUSION_MODELS)
def test_the_error_without_weights_explains_how_to_get_them(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert run(name, tmp_path / "grid.png") == 2
    errors, config = capsys.readouterr().err, diffusion_zoo.diffusion_config(name)
    assert f"hf download {diffusion_zoo.diffusion_hub_id(name)} --local-dir {name}\n" in errors
    assert f"hf download {diffusion_zoo.zoo.autoencoder_hub_id(config.autoencoder)} --local-dir {name}/auto" in errors


def test_a_folder_as_that_error_describes_it(tmp_path, monkeypatch):
    """The files of both repositories; the transformer's file is in the trainer's format."""
    config = replace(UVIT, autoencoder="dc-ae-test")
    monkeypatch.setitem(diffusion_zoo.DIFFUSION_MODELS, "test", config)
    model = build(diffusion_zoo.diffusion_config("test"))
    model.save_pretrained(tmp_path / "test")
    state = {f"0.{name}": tensor for name, tensor in model.diffusion_model.state_dict().items()}
    (tmp_path / "test" / "model.safetensors").unlink()
    torch.save({"model_state_dict": state, "ema": {0.9999: state}}, tmp_path / "test" / "checkpoint.pt")
    assert run(str(tmp_path / "test"), tmp_path / "grid.png", "--steps", "1") == 0


def test_without_torchdiffeq(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    assert run(models["flow"], tmp_path / "grid.png", "--sampler", "ODE_dopri5") == 2
    assert "pip install 'dcae_fast[ode]'" in capsys.readouterr().err
