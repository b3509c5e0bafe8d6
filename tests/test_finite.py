"""Models that compute NaN or infinity: the commands name the affected results, do not write them and exit with 1."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_diffusion import AUTOENCODER, build
from stand_ins import use

from dcae_fast import cli
from dcae_fast.errors import NotFiniteError
from dcae_fast.evaluation import networks
from dcae_fast.finite import check_finite, finite_rows
from dcae_fast.models.autoencoder import DCAE

CPU = ["--device", "cpu", "--no-patch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A white picture and two grey ones, a model that overflows in float16 for white, and a model that computes NaN."""
    folder = tmp_path_factory.mktemp("finite")
    (folder / "pictures").mkdir()
    for name, grey in {"a": 127, "b": 255, "c": 128}.items():
        Image.new("RGB", (8, 8), (grey,) * 3).save(folder / "pictures" / f"{name}.png")
    model = DCAE(AUTOENCODER)
    with torch.no_grad():
        model.encoder.project_in.conv.weight.fill_(6e3)
        model.save_pretrained(folder / "overflows")
        model.decoder.project_out.op_list[-1].conv.weight.fill_(torch.nan)
    model.save_pretrained(folder / "nan")
    return folder


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for name, loader in use().items():
        monkeypatch.setitem(networks.LOADERS, name, loader)


def run(*argv) -> int:
    return cli.main([*map(str, argv), *CPU])


def test_rows():
    x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [0.0, -torch.inf], [3.0, 4.0]])
    assert finite_rows(x) == [True, False, False, True] and finite_rows(x[:0]) == []
    check_finite(x[::3], ["one", "two"], torch.float16)
    with pytest.raises(NotFiniteError, match="in b, c, computed in float16; try --dtype bfloat16 or --dtype float32"):
        check_finite(x, "abcd", torch.float16)
    with pytest.raises(NotFiniteError, match="computed in bfloat16; try --dtype float32"):
        check_finite(x, "abcd", torch.bfloat16)
    with pytest.raises(NotFiniteError, match="and 2 more, computed in float32; the weights"):
        check_finite(x[[1] * 6], "abcdef", torch.float32)


@pytest.mark.parametrize("command, kind", [("reconstruct", "-reconstruction.png"), ("encode", ".safetensors")])
def test_one_picture_of_several(folder, tmp_path, capsys, command, kind):
    argv = command, folder / "pictures", "--model", folder / "overflows", "--out", tmp_path
    assert run(*argv, "--dtype", "float16") == 1
    errors = capsys.readouterr().err
    assert f"failed: {folder / 'pictures' / 'b.png'}: NaN or infinity" in errors and "--dtype bfloat16" in errors
    assert errors.count("failed") == 1 and {path.name[0] for path in tmp_path.iterdir()} == {"a", "c"}
    assert run(*argv, "--dtype", "float32") == 0 and (tmp_path / f"b{kind}").is_file()


def test_decode(folder, tmp_path, capsys):
    """The error names the dtype if the model computed NaN, and only the file if the latent already held NaN."""
    assert run("encode", folder / "pictures", "--model", folder / "nan", "--out", tmp_path) == 0
    tensors = load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert run("decode", tmp_path / "a.safetensors", "--out", tmp_path / "out", "--dtype", "bfloat16") == 1
    assert (
        f"{tmp_path / 'a.safetensors'}: NaN or infinity in the picture, computed in bfloat16" in capsys.readouterr().err
    )
    tensors["latent"][0, 0] = torch.inf
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    assert run("decode", tmp_path / "a.safetensors", "--out", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert str(tmp_path / "a.safetensors") in errors and "NaN or infinity in the latent" in errors
    assert "--dtype" not in errors and not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("part", ["diffusion_model", "autoencoder"])
def test_sample_and_eval_diffusion(tmp_path, capsys, part):
    model = build()
    next(reversed(list(getattr(model, part).parameters()))).data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    grid, latents = tmp_path / "out" / "grid.png", tmp_path / "out" / "latents.safetensors"
    argv = "--model", tmp_path / "model", "--steps", "1"
    assert run("sample", *argv, "--labels", "3", "5", "--out", grid, "--latents", latents) == 1
    what = "latent 1 (class 3), latent 2 (class 5)" if part == "diffusion_model" else "picture 1, picture 2"
    assert f"NaN or infinity in {what}, computed in float32" in capsys.readouterr().err
    assert not any(grid.parent.iterdir())
    assert run("eval-diffusion", *argv, "--samples", "3", "--batch", "2", "--out", tmp_path / "e", "--save", "npz") == 1
    assert "2 of 2 batches are not finite: batch 0: NaN or infinity in" in capsys.readouterr().err
    assert not any((tmp_path / "e" / "batches").iterdir()) and not (tmp_path / "e" / "results.json").exists()


def test_eval_autoencoder(folder, tmp_path, capsys):
    """Failed pictures are left out of the results; if all pictures fail, no results are written."""
    argv = "eval-autoencoder", folder / "pictures", "--resolution", "8", "--workers", "0"
    results = tmp_path / "results.json"
    assert run(*argv, "--model", folder / "overflows", "--dtype", "float16", "--out", tmp_path) == 1
    assert "failed: b.png: NaN or infinity in the reconstruction by" in capsys.readouterr().err
    content = json.loads(results.read_text())
    assert content["settings"]["images"] == 2
    assert np.isfinite([content["models"][str(folder / "overflows")][name] for name in ("rms", "psnr")]).all()
    results.unlink()
    assert run(*argv, "--model", folder / "nan", "--out", tmp_path) == 1
    output = capsys.readouterr()
    assert all(f"failed: {name}.png: NaN or infinity" in output.err for name in "abc")
    assert "PSNR" not in output.out and not results.exists()
