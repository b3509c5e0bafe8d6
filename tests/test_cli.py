"""The commands, run in this process with a small model of random weights."""

import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import dcae_fast
from dcae_fast import cli, images, reconstruction
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig
from dcae_fast.models.diffusion_zoo import BUNDLED


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a small model of ratio 8 that has every kind of block."""
    torch.manual_seed(0)
    coder = CoderConfig((8, 8, 16, 32), (0, 1, 1, 1), ("ResBlock",) * 3 + ("EViTGLU",), ("rms",) * 4, ("silu",) * 4)
    folder = tmp_path_factory.mktemp("models") / "small"
    DCAE(DCAEConfig(8, coder, coder, scaling_factor=0.5)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (45, 53, 3), np.uint8)).save(path)
    return path


def run(*argv) -> int:
    return cli.main([*map(str, argv)])


def cpu(model: str) -> list[str]:
    return ["--model", model, "--device", "cpu"]


def size(path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("fit, expected", [("crop", (48, 40)), ("pad", (53, 45))])
def test_reconstruct(model, photo, tmp_path, capsys, fit, expected):
    out = tmp_path / "out"
    assert run("reconstruct", photo, *cpu(model), "--out", out, "--fit", fit) == 0
    assert sorted(path.name for path in out.iterdir()) == ["photo-compared.png", "photo-reconstruction.png"]
    assert size(out / "photo-reconstruction.png") == expected
    text = capsys.readouterr().out
    assert str(out.resolve()) in text and f"{expected[0]}x{expected[1]} ({fit})" in text
    relative = float(re.search(r"relative (\S+)", text)[1])
    assert relative < 1e-4 and re.search(r"PSNR \d+\.\d\d dB", text)


def test_reconstruct_by_the_formulas(model, photo):
    network = DCAE.from_pretrained(model)
    result = reconstruction.reconstruct(photo, network, "crop")
    x = images.fit(images.read_photograph(photo), 8, "crop")
    with torch.inference_mode():
        expected = images.to_uint8(network(x))
    assert torch.equal(result.picture, expected) and torch.equal(result.original, images.to_uint8(x))
    assert result.psnr == images.psnr(expected, images.to_uint8(x)).item() and result.difference is None


def test_the_bundled_photograph_is_the_default(model, tmp_path, capsys):
    assert run("reconstruct", "--no-patch", *cpu(model), "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "bundled" in text and "patched" not in text
    assert (tmp_path / "chelsea-compared.png").is_file()


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_encode_then_decode_is_reconstruct(model, photo, tmp_path, fit):
    assert run("reconstruct", photo, *cpu(model), "--out", tmp_path / "a", "--fit", fit) == 0
    assert run("encode", photo, *cpu(model), "--out", tmp_path / "b", "--fit", fit) == 0
    with safe_open(tmp_path / "b" / "photo.safetensors", "pt") as file:
        metadata, latent = file.metadata(), file.get_tensor("latent")
    assert metadata == {
        "model": model,
        "scaling_factor": "0.5",
        "scaled": "false",
        "height": "45",
        "width": "53",
        "fit": fit,
    }
    assert latent.shape == ((1, 8, 5, 6) if fit == "crop" else (1, 8, 6, 7))
    assert run("decode", tmp_path / "b", "--device", "cpu", "--out", tmp_path / "c") == 0
    with (
        Image.open(tmp_path / "a" / "photo-reconstruction.png") as direct,
        Image.open(tmp_path / "c" / "photo-decoded.png") as decoded,
    ):
        assert np.array_equal(np.asarray(direct), np.asarray(decoded))


def test_latents_whose_model_was_deleted(model, photo, tmp_path, capsys):
    gone = shutil.copytree(model, tmp_path / "gone")
    for name, source in (("a", gone), ("b", model)):
        assert run("encode", photo, *cpu(source), "--out", tmp_path / name) == 0
    shutil.rmtree(gone)
    files = [tmp_path / name / "photo.safetensors" for name in "ab"]
    assert run("decode", *files, "--device", "cpu", "--out", tmp_path / "c") == 1
    assert f"failed: {files[0]}: " in capsys.readouterr().err
    assert len(list((tmp_path / "c").glob("*.png"))) == 1


def test_unreadable_files_are_reported_and_the_others_processed(model, photo, tmp_path, capsys):
    broken, tiny, missing = tmp_path / "broken.jpg", tmp_path / "tiny.png", tmp_path / "missing.png"
    broken.write_bytes(b"not a picture")
    Image.new("RGB", (4, 4)).save(tiny)
    assert run("reconstruct", broken, tiny, missing, photo, *cpu(model), "--out", tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert all(str(path) in errors for path in (broken, tiny, missing)) and str(photo) not in errors
    assert (tmp_path / "out" / "photo-reconstruction.png").is_file()


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_a_photograph_with_too_many_pixels(model, photo, tmp_path, capsys, command):
    Image.new("RGB", (80, 80)).save(tmp_path / "large.png")
    files = photo, tmp_path / "large.png"
    assert run(command, *files, *cpu(model), "--out", tmp_path / "out", "--no-patch", "--max-pixels", "6399") == 1
    reason = "cannot be read as a photograph: has more than 6399 pixels; --max-pixels raises the limit"
    assert f"failed: {tmp_path / 'large.png'}: {reason}" in capsys.readouterr().err
    assert any(path.name.startswith("photo") for path in (tmp_path / "out").iterdir())
    assert run(command, *files, *cpu(model), "--out", tmp_path / "out", "--no-patch", "--max-pixels", "6400") == 0
    assert run(command, *files, *cpu(model), "--max-pixels", "-1") == 2


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_photograph_that_does_not_fit_in_memory(model, photo, tmp_path, monkeypatch, capsys, error):
    encode = DCAE.encode

    def small(self, x):
        if x.shape[-1] > 60:
            raise error
        return encode(self, x)

    monkeypatch.setattr(DCAE, "encode", small)
    Image.new("RGB", (80, 80)).save(tmp_path / "large.png")
    assert run("encode", tmp_path / "large.png", photo, *cpu(model), "--out", tmp_path / "out", "--no-patch") == 1
    assert f"failed: {tmp_path / 'large.png'}: does not fit in memory" in capsys.readouterr().err
    assert (tmp_path / "out" / "photo.safetensors").is_file()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_model_that_does_not_fit_in_memory(photo, tmp_path, monkeypatch, capsys, error):
    def large(*args, **options):
        raise error

    monkeypatch.setattr(DCAE, "from_pretrained", large)
    assert run("encode", photo, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == "dcae-fast: not enough memory for the model\n"


def test_folders_and_equal_names(model, photo, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.open(photo).save(folder / "photo.png")
    Image.open(photo).save(folder / "photo.BMP")
    (folder / "notes.txt").write_text("not a photograph")
    assert run("encode", photo, folder, *cpu(model), "--out", tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["photo-2.safetensors", "photo-3.safetensors", "photo.safetensors"]
    assert "photo-3.safetensors" in capsys.readouterr().out


def test_long_names(model, photo, tmp_path):
    long = [shutil.copy(photo, tmp_path / f"{'ä' * 120}{end}.png") for end in ("a", "b")]  # 245 bytes
    assert run("encode", *long, *cpu(model), "--out", tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{'ä' * 100}-2.safetensors", f"{'ä' * 100}.safetensors"]


def test_an_empty_folder(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("reconstruct", tmp_path / "empty", *cpu(model)) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no tensors", None], ids=["empty", "garbage", "other tensors"])
def test_decode_names_a_file_that_is_not_a_latent(model, tmp_path, capsys, content):
    path = tmp_path / "latent.safetensors"
    if content is None:
        save_file({"other": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    assert run("decode", path, "--out", tmp_path / "out") == 1
    assert str(path) in capsys.readouterr().err


def test_convert(model, tmp_path):
    assert run("convert", model, tmp_path / "there", "--layout", "diffusers") == 0
    assert (tmp_path / "there" / "diffusion_pytorch_model.safetensors").is_file()
    assert run("convert", tmp_path / "there", tmp_path / "back", "--layout", "original") == 0
    before, after = (DCAE.from_pretrained(folder).state_dict() for folder in (model, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_convert_does_not_overwrite_the_other_layout(model, tmp_path, capsys):
    assert run("convert", model, tmp_path, "--layout", "diffusers") == 0
    config = (tmp_path / "config.json").read_bytes()
    assert run("convert", tmp_path, tmp_path, "--layout", "original") == 2
    assert "in another layout" in capsys.readouterr().err and (tmp_path / "config.json").read_bytes() == config


def test_models_table(capsys):
    assert run("models") == 0
    autoencoders, diffusion_models = capsys.readouterr().out.split("\n\n")
    heading, first, second, *_ = autoencoders.splitlines()
    assert heading.startswith("name") and first.split()[:4] == ["dc-ae-f32c32-in-1.0", "32", "32", "323.4"]
    assert second.split()[:4] == ["dc-ae-f64c128-in-1.0", "64", "128", "676.9"]
    rows = [line.split() for line in diffusion_models.splitlines()]
    assert ["dc-ae-f64c128-in-1.0-uvit-h-in-512px", "64", "500.9", "66", "DPM_Solver", "30"] in rows


def test_info(model, capsys):
    assert run("info", "dc-ae-f32c32-in-1.0") == 0
    text = capsys.readouterr().out
    assert "32x32 pixels become one latent position with 32 channels" in text and "scaling factor: 0.3189" in text
    assert re.search(r"LiteMLA +12", text)
    assert run("info", model) == 0
    assert "8x8 pixels become one latent position with 8 channels" in capsys.readouterr().out


def test_info_of_a_diffusion_model(capsys):
    assert run("info", "dc-ae-f64c128-in-1.0-uvit-h-in-512px") == 0
    text = capsys.readouterr().out
    assert re.search(r"latents +128x8x8, scaling factor 0.2889", text)
    assert re.search(r"sampler +DPM_Solver, 30 steps", text)
    assert "64x64 pixels become one latent position with 128 channels" in text and re.search(r"LiteMLA +\d+", text)
    assert run("info", BUNDLED["dc-ae-tiny-uvit-digits"]) == 0  # by its folder
    assert "DPM_Solver, 30 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "dc-ae-f32c32-in"], "dc-ae-f32c32-in-1.0"),
        (["--device", "nonsense"], "'nonsense'"),
        (["--device", "cuda:99"], "'cuda:99'"),
    ],
)
def test_invalid_models_and_devices(photo, tmp_path, capsys, argv, words):
    assert run("reconstruct", photo, "--out", tmp_path / "out", *argv) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("dcae-fast: ") and words in errors and "\n" not in errors


def test_torchrun_gives_each_process_its_gpu(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "98")
    assert run("reconstruct", photo, "--out", tmp_path / "out", "--device", "cuda") == 2
    assert "'cuda:98'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_no_input(command, capsys):
    assert run(command) == 2
    assert capsys.readouterr().err == "dcae-fast: PATH: expected at least one file or folder\n"


@pytest.mark.parametrize("argv", [[], ["reconstruct", "--dtype", "int8"], ["convert", "here"], ["unknown"]])
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2


def test_run_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dcae_fast", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("dcae_fast", run_name="__main__", alter_sys=True)
    assert not caught.value.code
    commands, text = ("reconstruct", "encode", "decode", "sample", "convert", "models", "info"), capsys.readouterr().out
    assert all(command in text for command in commands)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--version")
    assert not caught.value.code and capsys.readouterr().out == f"dcae_fast {dcae_fast.__version__}\n"


@pytest.mark.parametrize("argv", ["reconstruct", "encode a.png --out", "calibrate x --out", "encode a.png --int8"])
def test_an_empty_text_is_not_the_current_folder(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*argv.split(), "")
    assert caught.value.code == 2 and "Error parsing" in capsys.readouterr().err
