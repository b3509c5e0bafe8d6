"""The command `calibrate`, and the option --int8 of other commands, with a small model."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dcae_fast
from dcae_fast import cli
from dcae_fast.commands.common import Compute, UsageError
from dcae_fast.fast import int8, precisions
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig
from dcae_fast.ops import _library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYTHING = dcae_fast.ErrorBudget(decoding=0, encoding=0, loss=100)
CODER = CoderConfig((16, 16), (1, 1), ("ResBlock",) * 2, ("rms",) * 2, ("silu",) * 2)


@pytest.fixture
def kernels(monkeypatch) -> None:
    """On a CPU the operators run their references, faster than the interpreter."""
    if not int8.runs_on(torch.device(DEVICE)):
        pytest.skip("8-bit convolutions need a Hopper GPU")
    if DEVICE == "cpu":
        call = lambda self, *args: _library.as_channels_last(self.reference(*args))  # noqa: E731
        monkeypatch.setattr(_library.Operator, "__call__", call)


@pytest.fixture
def model(tmp_path) -> str:
    torch.manual_seed(0)
    DCAE(DCAEConfig(8, CODER, CODER, scaling_factor=0.5)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


def run(*argv) -> int:
    return cli.main([*map(str, argv)])


@pytest.fixture
def scales(kernels, model, photos, tmp_path):
    """Calibrated with a budget that all layers keep."""
    path = tmp_path / "scales.safetensors"
    budget = "--decoding", 0, "--encoding", 0, "--loss", 100
    assert run("calibrate", model, photos, "--out", path, "--device", DEVICE, "--dtype", "float32", *budget) == 0
    return path


def test_the_folder_of_the_photographs_may_hold_the_scales(kernels, model, photos):
    """The picture that compares has another name than a photograph, so nothing is overwritten."""
    before = (photos / "0.png").read_bytes()
    out = "--out", photos / "0.safetensors", "--device", DEVICE, "--decoding", 0, "--encoding", 0, "--loss", 100
    assert run("calibrate", model, photos / "0.png", *out) == 0
    assert (photos / "0.png").read_bytes() == before and (photos / "0-compared.png").is_file()


def test_calibrate(capsys, scales):
    text = capsys.readouterr().out
    assert "9 of 9 layers" in text and "Measured on 2 pictures" in text and "decoder.stages.0" in text
    assert "for 2 pictures of 16x16 pixels" in text and ("needs a GPU" in text) == (DEVICE == "cpu")
    with Image.open(scales.with_name("scales-compared.png")) as picture:
        assert picture.width > 3 * 16


def test_int8_is_used_and_recorded(scales, model, photos, tmp_path, capsys):
    options = "--model", model, "--device", DEVICE, "--dtype", "float32"
    common = *options, "--int8", scales
    assert run("reconstruct", photos / "0.png", *common, "--out", tmp_path / "out") == 0
    relative = float(capsys.readouterr().out.partition("relative ")[2].split()[0])
    assert 1e-4 < relative < 0.2
    cached = "--out", tmp_path / "latents", "--resolution", 16, "--workers", 0
    assert run("cache-latents", photos, *common, *cached) == 0
    precision = json.loads((tmp_path / "latents" / "manifest.json").read_text())["settings"]["precision"]
    assert precision.startswith("int8 ")
    other = tmp_path / "other.safetensors"
    with safe_open(scales, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    next(iter(tensors.values())).mul_(2)
    save_file(tensors, other, metadata)
    for different in ((), ("--int8", other)):
        assert run("cache-latents", photos, *options, *different, *cached) == 2
        assert f"contains latents with precision {precision}, not " in capsys.readouterr().err
    evaluated = "--out", tmp_path / "evaluation", "--resolution", 16, "--workers", 0, "--compare"
    assert run("eval-autoencoder", photos, *common, *evaluated) in (0, 1)  # 1 without the networks of metrics
    content = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    models = content["models"]
    assert content["settings"]["precision"] == precision
    assert 1e-4 < models[model]["latent_error"] < 0.2 and "latent_error" not in models["exact"]
    assert "latent error" in capsys.readouterr().out


def test_without_8_bit_kernels(scales, model, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(int8, "runs_on", lambda device: False)
    assert run("calibrate", model, photos, "--out", tmp_path / "other.safetensors", "--device", DEVICE) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err
    common = "--model", model, "--device", DEVICE, "--dtype", "float32", "--int8", scales
    assert run("encode", photos / "0.png", *common, "--out", tmp_path / "out") == 0
    assert "on this device the model computes exactly" in capsys.readouterr().err
    evaluated = "--model", model, "--device", DEVICE, "--int8", scales, "--compare", "--out", tmp_path / "evaluation"
    assert run("eval-autoencoder", photos, *evaluated, "--resolution", 16) == 2
    assert "both models are exact" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_missing_scales_are_reported_once(model, photos, tmp_path, capsys, command):
    options = "--model", model, "--device", "cpu", "--int8", tmp_path / "missing.safetensors", "--out", tmp_path / "out"
    assert run(command, photos, *options) == 2
    text = capsys.readouterr().err
    assert text.count("cannot be read as scales") == 1 and "failed" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["calibrate", "dc-ae-tiny", "--out", "scales"], "ends in .safetensors"),
        (["calibrate", "dc-ae-tiny", "--out", "."], "ends in .safetensors"),
        (["eval-autoencoder", "photos", "--model", "dc-ae-tiny", "--compare"], "give --int8"),
    ],
)
def test_bad_options(options, message, capsys):
    assert run(*options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["scales.safetensors", "--no-patch"], "--int8 --no-patch"),
        (["photos"], "--int8: photos does not exist"),
        (["one.safetensors", "two.safetensors"], "expected one such file"),
    ],
)
def test_bad_files_of_scales(options, message, capsys):
    with pytest.raises(SystemExit):
        run("encode", "photo.png", "--int8", *options)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode"])
def test_files_behind_int8_are_not_the_pictures(command, photos, capsys):
    assert run(command, "--int8", photos / "0.png") == 2
    assert "0.png: calibrates on these; give other files before it" in capsys.readouterr().err


def test_int8_calibrates_on_pictures(kernels, model, photos, tmp_path, capsys, monkeypatch):
    """With the same result as a file of the same calibration; without pictures, on the bundled photograph."""
    monkeypatch.setattr(dcae_fast, "patch", functools.partial(dcae_fast.patch, error_budget=EVERYTHING))
    exactly = "--model", model, "--device", DEVICE, "--dtype", "float32"
    scales = tmp_path / "scales.safetensors"
    limits = "--decoding", 0, "--encoding", 0, "--loss", 100
    assert run("calibrate", model, photos, "--out", scales, *exactly[2:], *limits) == 0
    capsys.readouterr()
    for name, value in {"file": [scales], "pictures": [photos], "bundled": []}.items():
        assert run("encode", photos / "0.png", *exactly, "--out", tmp_path / name, "--int8", *value) == 0
        text = capsys.readouterr().out
        assert ("9 of 9 layers" in text) == (name != "file") and ("Measured on 1 picture:" in text) == (
            name == "bundled"
        )
    file, pictures, bundled = (
        load_file(tmp_path / name / "0.safetensors")["latent"] for name in ("file", "pictures", "bundled")
    )
    assert torch.equal(file, pictures) and not torch.equal(file, bundled)


def on_two_ranks(rank: int, folder: Path) -> None:
    """Writes the precision, and the error for a folder with a broken picture, of this rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DCAE.from_pretrained(str(folder / "model"))
    monkey = pytest.MonkeyPatch()
    monkey.setattr(dcae_fast, "patch", functools.partial(dcae_fast.patch, error_budget=EVERYTHING))
    if rank == 1:
        monkey.setattr(precisions, "calibrate", None)  # only the main rank calibrates
    precision = Compute(device="cpu", int8=(folder / "photos",)).patch_model(model)
    try:
        Compute(device="cpu", int8=(folder / "model",)).patch_model(model)
    except UsageError as error:
        (folder / f"{rank}.txt").write_text(f"{precision}\n{error}")
    dist.barrier()
    os._exit(0)


@pytest.mark.skipif(DEVICE == "cuda" or not dist.is_available(), reason="forks processes that compute on a CPU")
def test_the_main_rank_calibrates_for_all(kernels, model, photos, tmp_path):
    torch.multiprocessing.start_processes(on_two_ranks, (tmp_path,), 2, start_method="fork")
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second and first.startswith("int8 ") and "holds no picture" in first


def test_pictures_that_cannot_be_used(kernels, model, photos, tmp_path, capsys):
    (photos / "2.png").write_bytes(b"no picture")
    common = "--model", model, "--device", DEVICE, "--out", tmp_path / "out"
    assert run("encode", photos / "0.png", *common, "--int8", photos) == 2
    text = capsys.readouterr().err
    assert text.startswith("dcae-fast: --int8: ") and "2.png" in text
