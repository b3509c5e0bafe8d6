"""The bundled autoencoder performs as its model card states."""

import re

import pytest
import torch
from PIL import Image

import dcae_fast
from dcae_fast import images, reconstruction
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.zoo import BUNDLED

FOLDER = BUNDLED["dc-ae-tiny"]
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no bundled model at {FOLDER}: see examples/train_tiny.py")


def test_size():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000


def test_reconstructs_the_held_out_photograph_as_its_card_says():
    model = DCAE.from_pretrained("dc-ae-tiny")
    stated = re.search(r"^\| chelsea \| held out \| 448x288 \| ([\d.]+) \|", (FOLDER / "README.md").read_text(), re.M)
    result = reconstruction.reconstruct(images.demo_photograph(), model, "crop")
    assert result.psnr >= float(stated[1]) - 0.1


def test_patched_it_reconstructs_the_same(tmp_path):
    part = tmp_path / "part.png"
    with Image.open(images.demo_photograph()) as photograph:
        photograph.crop((180, 90, 276, 154)).save(part)
    model = DCAE.from_pretrained("dc-ae-tiny")
    dcae_fast.patch(model)
    result = reconstruction.reconstruct(part, model, "crop")
    assert result.difference[1] <= 1e-4


def test_scaling_factor_is_one_over_rms():
    model = DCAE.from_pretrained("dc-ae-tiny")
    x = images.fit(images.read_photograph(images.demo_photograph()), 32, "crop")
    with torch.inference_mode():
        rms = model.encode(x).square().mean().sqrt().item()
    assert 0.5 < rms * model.scaling_factor < 2
