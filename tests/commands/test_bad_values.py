"""Bad values of every command's options: the error names the option or file, and nothing is computed."""

import re

import numpy as np
import pytest
from PIL import Image
from small_diffusion import AUTOENCODER, build

import dcae_fast
from dcae_fast import cli
from dcae_fast.commands.common import UsageError, parse_bytes
from dcae_fast.models.autoencoder import DCAE

HUGE = str(10**30)
COMMANDS = {  # valid arguments; the paths are in `folder`, which holds `pictures`, `latents`, `file`, `ae`, `diffusion`
    "reconstruct": ["pictures", "--model", "ae"],
    "encode": ["pictures", "--model", "ae"],
    "decode": ["latents", "--model", "ae"],
    "sample": ["--model", "diffusion"],
    "cache-latents": ["pictures", "--model", "ae", "--out", "cache"],
    "train-diffusion": ["uvit-h-f64", "--data", "latents", "--out", "run", "--dry-run"],
    "train-autoencoder": ["full", "--data", "pictures", "--out", "run", "--dry-run"],
    "reference-stats": ["pictures"],
    "eval-autoencoder": ["pictures", "--model", "ae"],
    "eval-diffusion": ["--model", "diffusion", "--save", "npz"],
    "convert": ["ae"],
}
CASES = [
    ("reconstruct", "--out file", "--out: cannot create the folder file: it is a file"),
    ("reconstruct", "--fit stretch", "--fit"),
    ("reconstruct", "--model file", "file: "),
    ("encode", "--out file/below", "--out: cannot create the folder file/below"),
    ("encode", "--max-memory many", "--max-memory many: expected a size such as 4GiB"),
    ("encode", "--max-memory 1GiB --no-patch", "--max-memory --no-patch"),
    ("encode", "--device tpu9", "'tpu9'"),
    ("decode", "--model absent", "'absent'"),
    ("sample", f"--labels {HUGE}", f"--labels {HUGE}: expected at most 10"),
    ("sample", "--labels 3 11", "--labels 11: expected at most 10"),
    ("sample", "--labels 3 -1", "--labels -1: expected at least 0"),
    ("sample", f"--seed {HUGE}", f"--seed {HUGE}: expected at most"),
    ("sample", f"--steps {HUGE}", f"--steps {HUGE}: expected at most"),
    ("sample", "--seed -1", "--seed -1: expected at least 0"),
    ("sample", "--steps 0", "--steps 0: expected at least 1"),
    ("sample", "--steps 1000000", "steps=1000000"),
    ("sample", "--steps 1.5", "--steps"),
    ("sample", "--cfg=-inf", "--cfg -inf: expected a finite number"),
    ("sample", "--cfg nan", "--cfg nan: expected a finite number"),
    ("sample", "--sampler SDE", "sampler 'SDE'; the model was trained for DPM_Solver"),
    ("sample", "--device cuda:99", "'cuda:99'"),
    ("sample", "--latents pictures", "--latents pictures: is a folder"),
    ("sample", "--latents z.npy", "--latents z.npy: expected a file name that ends in .safetensors"),
    ("sample", "--latents file/z", "--latents: cannot create the folder file"),
    ("sample", "--out pictures", "--out pictures: expected a file name that ends in .png"),
    ("sample", "--out grid.jpg", "--out grid.jpg: expected a file name that ends in .png"),
    ("sample", "--model ae", "ae/config.json"),
    ("sample", "--model dc-ae-f32c32-in-1.0-uvit-x", "did you mean 'dc-ae-f32c32-in-1.0-uvit-"),
    ("cache-latents", "--batch 0", "--batch 0: expected at least 1"),
    ("cache-latents", f"--batch {HUGE}", f"--batch {HUGE}: expected at most"),
    ("cache-latents", "--resolution -2", "--resolution -2: expected at least 1"),
    ("cache-latents", "--resolution 5", "--resolution 5: expected a multiple of 2"),
    ("cache-latents", f"--workers {HUGE}", f"--workers {HUGE}: expected at most"),
    ("cache-latents", "--workers -1", "--workers -1: expected at least 0"),
    ("cache-latents", "--scale nan", "--scale nan"),
    ("cache-latents", "--scale 0", "--scale 0.0: expected a number from 1e-06"),
    ("cache-latents", "--scale 1e-320", "expected a number from 1e-06"),
    ("cache-latents", "--out file --resolution 8", "--out: cannot create the folder file: it is a file"),
    ("train-autoencoder", "--crop-scale 0.5 2", "crop_scale=(0.5, 2.0); expected two rising numbers"),
    ("train-autoencoder", "--gan-weight -1", "gan_weight=-1.0; expected at least 0"),
    ("train-autoencoder", "--gan-clamp 0", "gan_clamp=0.0; expected more than 0"),
    ("train-autoencoder", "--discriminator-layers 6", "discriminator_layers=6; expected 3, 4 or 5"),
    ("train-autoencoder", "--lecam-decay 1", "lecam_decay=1.0; expected at least 0, and less than 1"),
    ("train-autoencoder", "--resolution 0", "resolution=0; expected at least 1"),
    ("train-autoencoder", "--ema-decay 1", "ema_decay=1.0; expected between 0 and 1"),
    ("train-autoencoder", "--max-pixels 0", "max_pixels=0; expected at least 1"),
    ("train-diffusion", "--depth 0", "depth=0; expected at least 1"),
    ("train-diffusion", "--workers -1", "workers=-1; expected at least 0"),
    ("train-diffusion", f"--steps {HUGE}", f"steps={HUGE}; expected less than"),
    ("train-diffusion", "--lr inf", "lr=inf; expected a finite number"),
    ("train-diffusion", "--betas 2 0.9", "betas=(2.0, 0.9)"),
    ("train-diffusion", "--sample-cfg nan", "sample_cfg=nan; expected a finite number"),
    ("train-diffusion", "--data file", "file: no such folder"),
    ("train-diffusion", "--out file --no-dry-run", "--out: cannot create the folder file: it is a file"),
    ("reference-stats", "", "expected at least one of --fid, --precision-recall or --cmmd"),
    ("reference-stats", "--fid x.txt", "--fid x.txt: expected a file name that ends in .npz"),
    ("reference-stats", "--cmmd file/x.npy", "--cmmd: cannot create the folder file"),
    ("reference-stats", "--fid x.npz --batch 0", "--batch 0"),
    ("eval-autoencoder", f"--resolution {HUGE}", f"--resolution {HUGE}: expected at most"),
    ("eval-autoencoder", "--max-pixels 0", "--max-pixels 0: expected at least 1"),
    ("eval-autoencoder", "--resolution 7", "--resolution 7: expected a multiple of 2"),
    ("eval-autoencoder", "--reference file", "file: expected an .npz file with mu and sigma"),
    ("eval-autoencoder", "--reference nan.npz", "nan.npz: NaN or infinity in mu or sigma"),
    ("eval-autoencoder", "--reference pictures", "pictures: expected an .npz file with mu and sigma: Is a directory"),
    ("eval-autoencoder", "--out file --resolution 8", "--out: cannot create the folder file: it is a file"),
    ("eval-diffusion", f"--samples {HUGE}", f"--samples {HUGE}: expected at most"),
    ("eval-diffusion", f"--class-seed {HUGE}", f"--class-seed {HUGE}: expected at most"),
    ("eval-diffusion", "--cfg nan", "--cfg nan: expected a finite number"),
    ("eval-diffusion", "--steps 0", "--steps 0: expected at least 1"),
    ("eval-diffusion", "--sampler SDE", "sampler 'SDE'; the model was trained for DPM_Solver"),
    ("eval-diffusion", "--out file", "--out: cannot create the folder file: it is a file"),
    ("eval-diffusion", "--cmmd file", "file: expected an .npy file of features"),
    ("eval-diffusion", "--cmmd nan.npy", "nan.npy: NaN or infinity in the features"),
    ("convert", "file --layout diffusers", "destination: cannot create the folder file: it is a file"),
    ("convert", "there --layout none", "--layout"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad-values")
    for name in ("pictures", "latents"):
        (folder / name).mkdir()
    Image.new("RGB", (8, 8)).save(folder / "pictures" / "a.png")
    np.save(folder / "latents" / "a.npy", np.zeros((8, 4, 4), np.float32))
    (folder / "file").write_text("text")
    np.save(folder / "nan.npy", np.full((5, 4), np.nan, np.float32))
    np.savez(folder / "nan.npz", mu=np.zeros(4), sigma=np.full((4, 4), np.inf))
    DCAE(AUTOENCODER).save_pretrained(folder / "ae")
    build().save_pretrained(folder / "diffusion")
    return folder


def files_below(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command, options, words", CASES, ids=[f"{name} {options}"[:60] for name, options, _ in CASES])
def test_bad_values(folder, monkeypatch, capsys, command, options, words):
    monkeypatch.chdir(folder)
    before = files_below(folder)
    try:
        status = cli.main([command, *COMMANDS[command], *options.split()])
    except SystemExit as error:  # from the parser
        status = error.code
    errors = re.sub(r"[\s│]+", " ", capsys.readouterr().err)  # the parser wraps lines in a box
    assert status == 2 and words in errors and files_below(folder) == before
    assert not re.search("tyro|Traceback|Errno|pickle|Overflow", errors)


@pytest.mark.parametrize(
    "text, expected",
    [("4GiB", 4 * 2**30), ("1.5 gib", 3 * 2**29), ("500MB", 5 * 10**8), ("4096", 4096), ("1e9", 10**9)],
)
def test_sizes(text, expected):
    assert parse_bytes("--max-memory", text) == expected


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode", "sample", "cache-latents", "eval-autoencoder"])
def test_max_memory_reaches_patch(folder, tmp_path, monkeypatch, command):
    class Called(Exception):
        pass

    def patch(model, cuda_graphs=False, *, max_memory):
        raise Called(max_memory)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(dcae_fast, "patch", patch)
    monkeypatch.setattr(dcae_fast, "patched", patch)
    fitting = ["--resolution", "8"] if command in ("cache-latents", "eval-autoencoder") else []
    with pytest.raises(Called) as caught:
        cli.main([command, *COMMANDS[command], *fitting, "--max-memory", "1GiB", "--out", f"{tmp_path}/out.png"])
    assert caught.value.args == (2**30,)


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "4 apples", "nan", "inf", "1e400GiB"])
def test_invalid_sizes(text):
    with pytest.raises(UsageError, match=f"--max-memory {text}: expected a size"):
        parse_bytes("--max-memory", text)
