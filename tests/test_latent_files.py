"""Latent files, and `decode` on files of `cache-latents` and DC-Gen."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcae_fast import cli
from dcae_fast.data.latents import Shards
from dcae_fast.data.manifest import MANIFEST
from dcae_fast.errors import DataError
from dcae_fast.latent_files import Latent, LatentError, find_latents, load_latent, save_latent
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig
from dcae_fast.sample import Request, save_latents


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a model of ratio 8."""
    torch.manual_seed(0)
    coder = CoderConfig((8, 8, 16, 32), (0, 1, 1, 1), ("ResBlock",) * 4, ("rms",) * 4, ("silu",) * 4)
    folder = tmp_path_factory.mktemp("models") / "small"
    DCAE(DCAEConfig(8, coder, coder, scaling_factor=0.5)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("a/0.png", "b/0.png")):
        (folder / name).parent.mkdir()
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def run(*argv) -> int:
    return cli.main([*map(str, argv), "--device", "cpu", "--no-patch"])


def cached(model, photos, out, *options):
    """The folder of the photographs' latents, scaled by 0.25."""
    settings = "--resolution", "16", "--scale", "0.25", "--workers", "0"
    assert run("cache-latents", photos, "--model", model, *settings, "--out", out, *options) == 0
    return out


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("format, of_class", [("npy", "a"), ("safetensors", "latents-000000.safetensors")])
def test_cached_latents_decode_as_encoded_latents(model, photos, tmp_path, format, of_class):
    cache = cached(model, photos, tmp_path / "cache", "--format", format)
    assert run("encode", photos / "a", photos / "b", "--model", model, "--out", tmp_path / "single") == 0
    for source, out in {"cache": "0", "single": "1"}.items():
        assert run("decode", tmp_path / source, "--out", tmp_path / out) == 0
    names = ["0-2-decoded.png", "0-decoded.png"]
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == names
    for name in names:
        close = pixels(tmp_path / "0" / name).astype(int) - pixels(tmp_path / "1" / name)
        assert abs(close).max() <= 1  # decode divided by the factor that cache-latents multiplied by
    assert run("decode", cache / of_class, "--out", tmp_path / "part") == 0
    assert np.array_equal(pixels(tmp_path / "part" / "0-decoded.png"), pixels(tmp_path / "0" / "0-decoded.png"))


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_the_latents_of_all_buckets_are_decoded(model, photos, tmp_path, format):
    Image.new("RGB", (64, 16)).save(tmp_path / "wide.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "square.png")
    options = "--format", format, "--resolution", "32", "--buckets"
    cached(model, tmp_path, tmp_path / "cache", *options)
    assert run("decode", tmp_path / "cache", "--out", tmp_path / "out") == 0
    found = {path.name: pixels(path).shape[:2] for path in (tmp_path / "out").iterdir()}
    assert found == {"square-decoded.png": (32, 32), "wide-decoded.png": (16, 64)}


def test_dc_gen_files_need_a_model(model, photos, tmp_path, capsys):
    cache = cached(model, photos, tmp_path / "cache", "--scale", "0.5")  # the model's scaling factor
    assert run("decode", cache, "--out", tmp_path / "expected") == 0
    (cache / MANIFEST).unlink()
    assert run("decode", cache, "--out", tmp_path / "out") == 1
    assert (
        f"{cache / 'a' / '0.npy'}: found no manifest.json that names the model; name the model with --model"
        in capsys.readouterr().err
    )
    assert run("decode", cache, "--model", model, "--out", tmp_path / "out") == 0
    assert np.array_equal(pixels(tmp_path / "out" / "0-decoded.png"), pixels(tmp_path / "expected" / "0-decoded.png"))


def test_another_model_than_the_manifest_names(model, photos, tmp_path, capsys):
    moved = shutil.copytree(model, tmp_path / "moved")
    cache = cached(moved, photos, tmp_path / "cache")
    shutil.rmtree(moved)
    assert run("decode", cache, "--out", tmp_path / "out") == 1
    assert run("decode", cache, "--out", tmp_path / "out", "--model", model) == 0
    assert run("decode", cache, "--out", tmp_path / "out", "--model", tmp_path / "nowhere") == 2
    assert run("decode", cache, "--out", tmp_path / "out", "--model", "dc-ae-tiny") == 1
    assert f"{cache / 'a' / '0.npy'}: z has shape [1, 8, 2, 2]; expected [B, 64, " in capsys.readouterr().err


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_invalid_latents_are_reported_and_the_others_decoded(model, photos, tmp_path, capsys, format):
    cache = cached(model, photos, tmp_path / "cache", "--format", format)
    if format == "npy":
        np.save(cache / "a" / "0.npy", np.full((8, 2, 2), np.nan, np.float32))
        bad = cache / "a" / "0.npy"
    else:
        path = cache / "latents-000000.safetensors"
        tensors = load_file(path)
        tensors["latents"][0, 0, 0, 0] = float("inf")
        save_file(tensors, path)
        bad = path / "0"  # the metadata held the names
    assert run("decode", cache, "--out", tmp_path / "out") == 1
    assert f"failed: {bad}: contains NaN or infinity" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_torn_files_and_an_empty_folder(model, photos, tmp_path, capsys):
    cache = cached(model, photos, tmp_path / "cache", "--format", "safetensors")
    torn = cache / "latents-000001.safetensors"
    torn.write_bytes(b"torn")
    save_file({"latents": torch.zeros(1, 8, 2, 2)}, cache / "latents-000002.safetensors")
    assert run("decode", cache, "--out", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert f"failed: {torn}: not a readable safetensors file" in errors
    assert "latents-000002.safetensors: not a readable shard of latents" in errors
    assert len(list((tmp_path / "out").iterdir())) == 2
    (tmp_path / "empty").mkdir()
    assert run("decode", tmp_path / "empty", "--out", tmp_path / "out") == 2
    assert "expected latents in this folder, found no .npy or .safetensors file" in capsys.readouterr().err


def test_an_invalid_manifest_does_not_matter_for_encoded_latents(model, photos, tmp_path, capsys):
    (tmp_path / MANIFEST).write_text(json.dumps({"name": "a web app"}))
    assert run("encode", photos / "a", "--model", model, "--out", tmp_path / "single") == 0
    assert run("decode", tmp_path / "single", "--out", tmp_path / "out") == 0
    np.save(tmp_path / "single" / "1.npy", np.zeros((8, 2, 2), np.float32))
    assert run("decode", tmp_path / "single", "--out", tmp_path / "out") == 1
    assert f"{tmp_path / MANIFEST}: not a manifest of cached latents" in capsys.readouterr().err


def test_round_trip(tmp_path):
    latent = Latent(torch.randn(1, 8, 2, 2), "m", None, (15, 16), "pad")
    save_latent(latent, tmp_path / "a.safetensors")
    read = load_latent(tmp_path / "a.safetensors")
    assert torch.equal(read.z, latent.z) and read.unscaled(3.0) is read.z
    assert (read.model, read.scaling_factor, read.size, read.fit) == ("m", None, (15, 16), "pad")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z: z[0], r"the latent is float32 \[8, 2, 2\]; expected floats \[1, c, h, w\]"),
        (lambda z: z[:0], r"float32 \[0, 8, 2, 2\]"),
        (lambda z: z.expand(2, -1, -1, -1), r"float32 \[2, 8, 2, 2\]"),
        (lambda z: z[:, :, :0], r"float32 \[1, 8, 0, 2\]"),
        (lambda z: z.int(), "int32"),
        (lambda z: z.to(torch.complex64), "complex64"),
        (lambda z: z.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        ({"height": "0"}, "height is '0' in its metadata; expected a number of pixels"),
        ({"width": "-3"}, "width is '-3'"),
        ({"width": "wide"}, "width is 'wide'"),
        ({"width": "9" * 30}, "width is '999"),
        ({"scaling_factor": "nan"}, "scaling_factor is 'nan' in its metadata; expected a positive number"),
        ({"scaling_factor": "0"}, "scaling_factor is '0'"),
        ({"scaling_factor": "x"}, "scaling_factor is 'x'"),
        ({"fit": "stretch"}, r"fit is 'stretch' in its metadata; expected one of \('crop', 'pad'\)"),
        ({"scaled": "true"}, "scaled is 'true' in its metadata"),
        ({"model": None}, "its metadata lacks 'model'"),
    ],
)
def test_invalid_latent_files_are_named(tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    save_latent(Latent(torch.randn(1, 8, 2, 2), "m", None, (16, 16), "crop"), path)
    with safe_open(path, framework="pt") as file:
        z, metadata = file.get_tensor("latent"), file.metadata()
    if callable(change):
        z = change(z)
    else:
        metadata = {name: value for name, value in (metadata | change).items() if value is not None}
    save_file({"latent": z.contiguous()}, path, metadata)
    ((_, load),) = find_latents(path).items()
    with pytest.raises(LatentError, match=f"{path}: not a latent written by dcae-fast encode: .*{message}"):
        load()


def test_cached_latents_without_pixels(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 0, 2), np.float32))
    tensors = {"latents": torch.zeros(1, 8, 0, 2), "classes": torch.zeros(1, dtype=torch.int64)}
    save_file(tensors, tmp_path / "b.safetensors")
    for path, load in find_latents(tmp_path).items():
        with pytest.raises(DataError, match=rf"{path}: .*8, 0, 2\]; expected floats"):
            load()


def test_latents_of_sample_are_named(tmp_path):
    request = Request((1,), 6.0, 0, "DPM_Solver", 2)
    save_latents(torch.zeros(1, 8, 2, 2), request, "a model", tmp_path / "z.safetensors")
    ((path, load),) = find_latents(tmp_path).items()
    with pytest.raises(LatentError, match=f"{path}: latents of `dcae-fast sample`, which draws them; expected"):
        load()


def test_pipes_are_not_waited_for(tmp_path):
    for name in ("a.npy", "b.safetensors", "latents-000000.safetensors"):
        os.mkfifo(tmp_path / name)
    for path, load in find_latents(tmp_path).items():
        with pytest.raises((LatentError, DataError), match=f"{path}: .*: not a regular file"):
            load()
    with pytest.raises(DataError, match="latents-000000.safetensors: .*: not a regular file"):
        Shards([tmp_path / "latents-000000.safetensors"])


def test_a_photograph_that_is_larger_than_the_decoded_picture():
    latent = Latent(torch.zeros(1, 8, 2, 2), "m", None, (17, 9), "pad")
    assert latent.crop(torch.zeros(1, 3, 24, 16)).shape == (1, 3, 17, 9)
    with pytest.raises(LatentError, match="the photograph has 9x17 pixels in its metadata, the decoded picture 16x16"):
        latent.crop(torch.zeros(1, 3, 16, 16))


def test_unscaled(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((8, 2, 2), np.float16))
    ((path, load),) = find_latents(tmp_path).items()
    assert path == tmp_path / "a.npy" and torch.equal(load().unscaled(4.0), torch.full((1, 8, 2, 2), 0.25))
    with pytest.raises(LatentError, match="the model has no scaling factor"):
        load().unscaled(None)
    with pytest.raises(DataError, match="expected latents in this folder"):
        (tmp_path / "b").mkdir()
        find_latents(tmp_path / "b")
