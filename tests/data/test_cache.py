"""The command cache-latents, run in this process: layouts, resuming, and refused requests."""

import copy
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_pictures import BROKEN, SIZES, contents, png, run, save_noise, save_shard

from dcae_fast import cli, images
from dcae_fast.data.cache import cache_latents, settings_of
from dcae_fast.data.encode import BatchEncoder
from dcae_fast.data.find import find_pictures
from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.manifest import MANIFEST, Sums, load_manifest, statistics
from dcae_fast.data.sources import SOURCES
from dcae_fast.data.store import NpyStore
from dcae_fast.finite import not_finite_message
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig

pytestmark = pytest.mark.usefixtures("small_shards")
NAMES = sorted(SIZES)


@pytest.fixture(scope="module")
def model():
    return DCAE.from_pretrained("dc-ae-tiny")


def by_hand(model, path) -> torch.Tensor:
    weight = next(model.parameters())
    with Image.open(path) as image, torch.inference_mode():
        x = images.to_tensor(images.centre_crop(image.convert("RGB"), 64, 64))
        return model.encode(x.to(weight.device, weight.dtype))[0].float().cpu() * 0.5


def check_half(got: torch.Tensor, model, path, dtype: torch.dtype, device: str = "cpu") -> None:
    """The error against float32 is at most twice the error of the plain model in the same dtype."""
    expected, plain = by_hand(model, path), by_hand(copy.deepcopy(model).to(device, dtype), path)
    assert (got.float() - expected).norm() <= 2 * (plain - expected).norm()


def test_npy_as_the_original(pictures, tmp_path, model, compare, capsys):
    assert run(pictures, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert f"failed: {pictures / BROKEN}: " in captured.err
    assert "7 latents in " in captured.out and " images/s" in captured.out and "of the time" in captured.out
    expected = {
        MANIFEST,
        SOURCES,
        "cat/a.npy",
        "cat/b.b.npy",
        "cat/c.npy",
        "dog/a.npy",
        "dog/d.npy",
        "dog/e.npy",
        "emu/f.npy",
    }
    assert contents(tmp_path / "out").keys() == expected
    latents = []
    for name in NAMES:
        latent = np.load((tmp_path / "out" / name).with_suffix(".npy"))
        assert latent.dtype == np.float32 and latent.flags.c_contiguous and latent.shape == (64, 2, 2)
        compare("eager", torch.from_numpy(latent), by_hand(model, pictures / name), 5e-6, name)
        latents.append(latent)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    everything = np.stack(latents).astype(np.float64)
    assert manifest["rms"] == pytest.approx(np.sqrt(np.square(everything).mean()), rel=1e-12)
    assert manifest["mean"] == pytest.approx(everything.mean(), rel=1e-12)
    assert manifest["std"] == pytest.approx(everything.std(ddof=1), rel=1e-12)
    assert (manifest["images"], manifest["latents"], manifest["skipped"]) == (8, 7, [BROKEN])
    assert manifest["settings"] == {
        "model": "dc-ae-tiny",
        "dtype": "float32",
        "resolution": 64,
        "scaling_factor": 0.5,
        "format": "npy",
        "weights": manifest["settings"]["weights"],
        "shape": [64, 2, 2],
        "as_original": False,
        "precision": "exact",
        "buckets": False,
    }


def test_shards(pictures, tmp_path):
    assert run(pictures, tmp_path / "a") == run(pictures, tmp_path / "b", "--format", "safetensors") == 1
    npy, shards = LatentDataset(tmp_path / "a"), LatentDataset(tmp_path / "b")
    assert len(npy) == len(shards) == 7 and npy.classes == shards.classes == ("cat", "dog", "emu")
    for (one, label), (other, other_label) in zip(npy, shards, strict=True):
        assert torch.equal(one, other) and label == other_label
    with safe_open(tmp_path / "b" / "latents-000001.safetensors", "pt") as file:  # this shard lacks the broken picture
        assert file.get_tensor("latents").shape == (2, 64, 2, 2)
        assert json.loads(file.metadata()["names"]) == ["dog/a", "dog/d"]
    one, other = (load_manifest(tmp_path / name) for name in "ab")
    assert (one.mean, one.rms, one.std) == (other.mean, other.rms, other.std)


@pytest.mark.parametrize(
    "format, dtype, stored",
    [
        ("npy", "bfloat16", torch.float32),
        ("npy", "float16", torch.float16),
        ("safetensors", "bfloat16", torch.bfloat16),
    ],
)
def test_dtypes(pictures, tmp_path, model, format, dtype, stored):
    assert run(pictures / "emu", tmp_path, "--format", format, "--dtype", dtype) == 0
    if format == "npy":
        got = torch.from_numpy(np.load(tmp_path / "f.npy"))
    else:
        with safe_open(tmp_path / "latents-000000.safetensors", "pt") as file:
            got = file.get_tensor("latents")[0]
    assert got.dtype == stored
    check_half(got, model, pictures / "emu" / "f.png", getattr(torch, dtype))
    assert load_manifest(tmp_path).rms == statistics([Sums.of(got.float().numpy())])["rms"]


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_only_missing_or_damaged_latents_are_encoded_again(pictures, tmp_path, capsys, format):
    assert run(pictures, tmp_path, "--format", format) == 1
    whole = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix != ".json" and path.is_file()}
    torn, gone, *_ = times
    torn.write_bytes(torn.read_bytes()[:-50])
    gone.unlink()
    (tmp_path / f".{torn.name}.1.part").touch()
    capsys.readouterr()
    assert run(pictures, tmp_path, "--format", format) == 1
    assert contents(tmp_path) == whole
    assert all(path.stat().st_mtime_ns == before for path, before in times.items() if path not in (torn, gone))
    again = int(re.search(r"(\d+) latents in ", capsys.readouterr().out)[1])
    assert again == 2 if format == "npy" else 2 < again < 7


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_a_finished_run_encodes_nothing(pictures, tmp_path, capsys, format):
    assert run(pictures / "emu", tmp_path, "--format", format) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert run(pictures / "emu", tmp_path, "--format", format) == 0
    assert contents(tmp_path) == before
    text = capsys.readouterr().out
    assert "\n1 latents existed already" in text and "images/s" not in text


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_damaged_latents_of_broken_pictures_are_removed(tmp_path, format):
    save_noise(tmp_path / "pictures" / "a.png", 64, 64, 0)
    assert run(tmp_path / "pictures", tmp_path / "out", "--format", format) == 0
    (latent,) = (tmp_path / "out").glob(f"*.{format}")
    latent.write_bytes(latent.read_bytes()[:-50])
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    assert run(tmp_path / "pictures", tmp_path / "out", "--format", format) == 1
    assert contents(tmp_path / "out").keys() == {MANIFEST, SOURCES}


def test_latents_of_removed_pictures(tmp_path):
    for seed in range(5):
        save_noise(tmp_path / "pictures" / f"{seed}.png", 64, 64, seed)
    command = tmp_path / "pictures", tmp_path / "out", "--format", "safetensors"
    assert run(*command) == 0
    (tmp_path / "pictures" / "4.png").unlink()
    assert run(*command) == 0
    assert len(LatentDataset(tmp_path / "out")) == 4


def test_new_pictures_are_added(tmp_path, capsys):
    for format in ("npy", "safetensors"):
        pictures = tmp_path / f"pictures-{format}"
        for seed, name in enumerate(["a/0.png", "b/0.png", "b/0-1.png", "b/2.png"]):
            save_noise(pictures / name, 64, 64, seed)
        assert run(pictures, tmp_path / format, "--format", format) == 0
        save_noise(pictures / "a/1.png", 64, 64, 9)
        save_noise(pictures / "aa/0.png", 64, 64, 10)  # class numbers and shards change
        assert run(pictures, tmp_path / format, "--format", format) == 0
        assert run(pictures, tmp_path / f"{format}-new", "--format", format) == 0
        assert contents(tmp_path / format) == contents(tmp_path / f"{format}-new")
    for (one, label), (other, other_label) in zip(
        *map(LatentDataset, (tmp_path / "npy", tmp_path / "safetensors")), strict=True
    ):
        assert torch.equal(one, other) and label == other_label


@pytest.mark.parametrize(
    "options, words",
    [
        (["--resolution", "96"], "resolution 64, not 96"),
        (["--scale", "0.25"], "scaling_factor 0.5, not 0.25"),
        (["--dtype", "bfloat16"], "dtype float32, not bfloat16"),
        (["--format", "safetensors"], "format npy, not safetensors"),
    ],
)
def test_settings_are_not_mixed(pictures, tmp_path, capsys, options, words):
    assert run(pictures / "emu", tmp_path) == 0
    before = contents(tmp_path)
    assert run(pictures / "emu", tmp_path, *options) == 2
    assert f"{tmp_path} contains latents with {words}" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [[], ["--format", "safetensors"], ["--buckets"]])
def test_settings_of_a_run_without_a_latent_may_change(tmp_path, capsys, options):
    """No picture could be read, or the run was interrupted at once."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "0.png").write_text("no picture")
    assert run(tmp_path / "p", tmp_path / "out", *options) == 1
    save_noise(tmp_path / "p" / "0.png", 96, 96, 0)
    assert run(tmp_path / "p", tmp_path / "out", "--resolution", "96", "--scale", "0.25") == 0
    assert run(tmp_path / "p", tmp_path / "new", "--resolution", "96", "--scale", "0.25") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_other_weights_and_pictures_are_refused(pictures, tmp_path, model, capsys):
    assert run(pictures / "emu", tmp_path / "out") == 0
    for parameter in (other := DCAE(model.config)).parameters():
        torch.nn.init.zeros_(parameter)
    other.save_pretrained(tmp_path / "model")
    assert run(pictures / "emu", tmp_path / "out", "--model", tmp_path / "model") == 2
    assert "contains latents with weights" in capsys.readouterr().err
    assert run(pictures / "cat", tmp_path / "out") == 2
    assert "f.npy: latent of an unknown picture" in capsys.readouterr().err
    (tmp_path / "out" / MANIFEST).unlink()
    assert run(pictures / "emu", tmp_path / "out") == 2
    assert f"is not empty and has no {MANIFEST}" in capsys.readouterr().err


def test_latents_that_are_not_finite_are_left_out(pictures, tmp_path, model):
    settings = settings_of(model, "m", float("inf"), 64, "npy")
    report = cache_latents(find_pictures(pictures / "emu"), tmp_path, model, settings, workers=1)
    (skipped,) = report.skipped
    assert skipped == ("f.png", not_finite_message(["its latent"], torch.float32)) and report.encoded == 0
    assert contents(tmp_path).keys() == {MANIFEST, SOURCES} and report.manifest.mean is None


def test_patched(tmp_path, compare):
    torch.manual_seed(0)
    coder = CoderConfig((8, 8, 16, 32), (0, 1, 1, 1), ("ResBlock",) * 3 + ("EViTGLU",), ("rms",) * 4, ("silu",) * 4)
    DCAE(DCAEConfig(8, coder, coder)).save_pretrained(tmp_path / "model")
    save_noise(tmp_path / "pictures" / "a.png", 20, 24, 0)
    options = ["--model", tmp_path / "model", "--resolution", "16"]
    assert run(tmp_path / "pictures", tmp_path / "plain", *options) == 0
    assert run(tmp_path / "pictures", tmp_path / "patched", *options, "--patch", "--batch", "auto") == 0
    plain, patched = (torch.from_numpy(np.load(tmp_path / name / "a.npy")) for name in ("plain", "patched"))
    compare("eager", patched, plain, 5e-6)


ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


class Small(torch.nn.Module):
    """A model that runs out of memory with more than two pictures."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.weight, self.calls = torch.nn.Parameter(torch.ones(())), []

    def encode(self, x):
        self.calls.append(len(x))
        if len(x) > 2:
            raise self.error
        return x


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), ON_CPU, MemoryError()])
def test_batches_too_large_for_memory_are_halved(error):
    model, pixels = Small(error), torch.arange(7 * 12, dtype=torch.uint8).view(7, 2, 2, 3)
    encode = BatchEncoder(model, 2.0, 8)
    latents = encode(pixels)
    assert encode.batch == 2 and model.calls == [8, 4, 2, 2, 2, 2]
    assert torch.equal(latents, (pixels.permute(0, 3, 1, 2).float() / 255 * 2 - 1) * 2.0) and latents.is_contiguous()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), ON_CPU, MemoryError(), RuntimeError("a fault")])
def test_a_picture_too_large_for_memory(pictures, tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(DCAE, "encode", fail)
    if str(error) == "a fault":
        with pytest.raises(RuntimeError, match="a fault"):
            run(pictures / "emu", tmp_path)
    else:
        assert run(pictures / "emu", tmp_path) == 2
        assert "--resolution 64: a single picture does not fit in memory" in capsys.readouterr().err


def test_a_failed_write_is_an_error(pictures, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(NpyStore, "write", full)
    assert run(pictures, tmp_path) == 2
    assert "no space left" in capsys.readouterr().err


def test_rotation_is_the_same_as_in_encode(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (1, 64, 3))
    (tmp_path / "p").mkdir()
    Image.fromarray(ramp).save(tmp_path / "p" / "a.png", exif=exif)
    assert cli.main(["encode", str(tmp_path / "p"), "--out", str(tmp_path / "o"), "--device", "cpu", "--no-patch"]) == 0
    for name, options in {"seen": (), "original": ("--as-original",)}.items():
        assert run(tmp_path / "p", tmp_path / name, "--scale", "1", *options) == 0
        assert load_manifest(tmp_path / name).settings.as_original == (name == "original")
    encoded = load_file(tmp_path / "o" / "a.safetensors")["latent"][0]
    seen, original = (LatentDataset(tmp_path / name)[0][0] for name in ("seen", "original"))
    assert (seen - encoded).norm() < 1e-5 * encoded.norm() < (original - encoded).norm()


def test_long_names_and_names_that_are_not_text(tmp_path, monkeypatch):
    folder = tmp_path / "p"
    folder.mkdir()
    names = [b"l" * 240 + b".png", b"new\nline.png", b"\xff.png"]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(png(64, 64))
    with monkeypatch.context() as patch, open(tmp_path / "printed", "w", encoding="utf-8") as printed:
        patch.setattr("sys.stdout", printed)
        command = ["encode", str(folder), "--out", str(tmp_path / "single"), "--device", "cpu", "--no-patch"]
        assert cli.main(command) == 0
        assert run(folder, tmp_path / "out") == 0
    assert r"p/\udcff.png" in (tmp_path / "printed").read_text() and len(LatentDataset(tmp_path / "out")) == 3


def test_found_ignored_and_failed_files_are_printed(tmp_path, capsys):
    for name in ("a.avif", "b.PNG", "c.png", "c.jpg"):
        save_noise(tmp_path / "p" / name, 64, 64, 0)
    for number in range(10):
        (tmp_path / "p" / f"{number}.txt").touch()
    assert run(tmp_path / "p", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "2 pictures: 1 .avif, 1 .png\n" in out
    names = ", ".join(f"{number}.txt" for number in range(8))
    assert f"ignored, no picture suffix: {names}, ... and 2 more, listed in the manifest\n" in out
    assert f"failed: {tmp_path / 'p' / 'c.png'}: c.jpg, c.png would share the latent c; expected unique names\n" in err
    manifest = load_manifest(tmp_path / "out")
    assert len(manifest.ignored) == 10 and manifest.skipped == ("c.jpg", "c.png") and manifest.latents == 2


def test_failed_members_and_class_names_are_printed(tmp_path, capsys):
    members = {"7.png": png(64, 64), "7.cls": b"tench", "8.png": b"broken", "8.cls": b"tench"}
    save_shard(tmp_path / "a.tar", members)
    assert run(tmp_path / "a.tar", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "class names, each with the first member that contains it: 0 tench (a.tar/7.cls)\n" in out
    assert f"failed: {tmp_path}/a.tar/8.png: not a picture that Pillow can read\n" in err
    assert LatentDataset(tmp_path / "out").classes == ("tench",)


def test_max_pixels(pictures, tmp_path, capsys):
    assert run(pictures / "cat", tmp_path / "out", "--max-pixels", "5000") == 1
    assert f"failed: {pictures / 'cat' / 'b.b.jpg'}: has more than 5000 pixels; --max-pixels" in capsys.readouterr().err
    assert run(pictures / "cat", tmp_path / "out", "--max-pixels", "20000") == 0
    assert run(pictures / "cat", tmp_path / "out", "--max-pixels", "0") == 2


def test_the_folder_is_locked_during_a_run(pictures, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    program = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint('held')\ninput()"
    )
    other = subprocess.Popen(
        [sys.executable, "-uc", program, tmp_path / "out" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    assert run(pictures / "emu", tmp_path / "out") == 2
    assert f"{tmp_path / 'out'} is in use by another process" in capsys.readouterr().err
    other.kill()
    other.wait()
    assert run(pictures / "emu", tmp_path / "out") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [["--patch"], ["--no-patch"]])
def test_on_a_gpu(pictures, tmp_path, model, options, capsys):
    assert run(pictures, tmp_path, "--device", "cuda", "--batch", "auto", "--workers", "2", *options) == 1
    assert "7 latents in " in capsys.readouterr().out
    for name in NAMES:
        got = torch.from_numpy(np.load((tmp_path / name).with_suffix(".npy")))
        check_half(got, model, pictures / name, torch.bfloat16, "cuda")
