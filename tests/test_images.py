"""Photographs of every mode: reading, fitting, quantisation, PSNR, comparison sheets and saving."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dcae_fast import images
from dcae_fast.files import written_atomically

RED = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)


def gradient(height: int = 40, width: int = 50) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width) * 5
    pixels[..., 1] = np.arange(height)[:, None] * 6
    return Image.fromarray(pixels)


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "tif")])
@pytest.mark.parametrize("as_path", [str, lambda path: path], ids=["str", "Path"])
def test_reads_every_mode(tmp_path, mode, suffix, as_path):
    image = gradient().convert(mode)
    path = tmp_path / f"photo.{suffix}"
    image.save(path)
    x = images.read_photograph(as_path(path))
    assert x.shape == (1, 3, 40, 50) and x.dtype == torch.float32
    assert torch.equal(images.to_uint8(x), images.to_uint8(images.to_tensor(image.convert("RGB"))))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255)).convert(mode)
    image.putalpha(Image.fromarray(np.array([[255] * 4, [0] * 4, [128] * 4, [255] * 4], np.uint8)))
    image.save(tmp_path / "photo.png")
    x = images.to_uint8(images.read_photograph(tmp_path / "photo.png"))
    assert (x[:, :, 1] == 255).all()
    colour = x[0, :, 0, 0]
    assert ((x[0, :, 2, 0].int() - (colour.int() * 128 + 255 * 127) // 255).abs() <= 1).all()


def test_transparent_palette_is_composited_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "photo.png", transparency=1)
    x = images.read_photograph(tmp_path / "photo.png")
    assert (x[..., 0, 0] == 1).all() and torch.equal(x[..., 3:, 3:], RED)


def test_16_bit_grey_keeps_its_precision(tmp_path):
    values = np.array([[0, 1, 257, 32768], [65535, 5, 6, 7]], np.uint16)
    Image.fromarray(values).save(tmp_path / "photo.png")
    x = images.read_photograph(tmp_path / "photo.png")
    expected = torch.from_numpy(values.astype(np.float64) / 65535 * 2 - 1)
    assert torch.allclose(x.double(), expected.expand(1, 3, 2, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_integers_beyond_16_bits_are_refused(tmp_path, value):
    """Their range is not defined: they would be white or black."""
    Image.fromarray(np.array([[0, value]], np.int32)).save(tmp_path / "photo.tif")
    with pytest.raises(images.PhotographError, match=f"has pixels from .*{value}.*; expected 0 to 65535"):
        images.read_photograph(tmp_path / "photo.tif")


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    gradient(16, 32).save(tmp_path / "photo.png", exif=exif)
    x = images.read_photograph(tmp_path / "photo.png")
    assert torch.equal(x, images.to_tensor(gradient(16, 32).rotate(-90, expand=True)))


def test_the_first_frame_is_read(tmp_path):
    gradient().save(tmp_path / "photo.tif", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert torch.equal(images.read_photograph(tmp_path / "photo.tif"), images.to_tensor(gradient()))


@pytest.mark.parametrize("content", [None, b"", b"no picture", "truncated", "float"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "photo.png"
    if content == "truncated":
        images.save_png(gradient(200, 200), path)
        path.write_bytes(path.read_bytes()[:200])
    elif content == "float":
        path = tmp_path / "photo.tif"
        Image.new("F", (4, 4)).save(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(images.PhotographError, match=path.name):
        images.read_photograph(path)


def test_demo_photograph():
    x = images.read_photograph(images.demo_photograph())
    assert x.shape == (1, 3, 300, 451)
    assert images.demo_photograph().stat().st_size <= 300_000


def test_centre_crop_as_the_original(reference):
    cases = json.loads((reference / "fixtures" / "pipeline.json").read_text())["dm_crop"]
    tensors = load_file(reference / "fixtures" / "pipeline.safetensors")
    for case in cases:
        image, crop = (tensors[f"dm_crop/{case['index']}/{name}"] for name in ("image", "crop"))
        height, width = case["target"] if isinstance(case["target"], list) else [case["target"]] * 2
        got = images.centre_crop(Image.fromarray(image.numpy()), height, width)
        assert np.array_equal(np.asarray(got), crop.numpy()), case


def test_quantised_as_the_original(reference):
    tensors = load_file(reference / "fixtures" / "pipeline.safetensors")
    assert torch.equal(images.to_uint8(tensors["quantise/decoded"]), tensors["quantise/autoencoder_uint8"])


def test_psnr_as_the_original(reference):
    tensors = load_file(reference / "fixtures" / "pipeline.safetensors")
    got = images.psnr(tensors["psnr/prediction"], tensors["psnr/reference"])
    assert torch.allclose(got, tensors["psnr/each"].double(), rtol=1e-6, atol=0)


def test_psnr_of_equal_and_of_invalid_pictures():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert images.psnr(x, x).isinf().all()
    with pytest.raises(ValueError, match="expected two uint8 tensors of one shape"):
        images.psnr(x, x[:1])
    with pytest.raises(ValueError, match="expected two uint8 tensors of one shape"):
        images.psnr(x.float(), x)


def test_uint8_survives_conversion_to_float_and_back():
    image = gradient()
    assert np.array_equal(np.asarray(images.to_image(images.to_tensor(image))), np.asarray(image))


@pytest.mark.parametrize("height, width", [(32, 64), (33, 95), (63, 32), (300, 451)])
def test_fit(height, width):
    x = torch.randn(2, 3, height, width)
    cropped, padded = images.fit(x, 32, "crop"), images.fit(x, 32, "pad")
    top, left = (height - cropped.shape[2]) // 2, (width - cropped.shape[3]) // 2
    assert cropped.shape[2:] == (height // 32 * 32, width // 32 * 32)
    assert torch.equal(cropped, x[..., top : top + cropped.shape[2], left : left + cropped.shape[3]])
    assert padded.shape[2:] == (-(-height // 32) * 32, -(-width // 32) * 32)
    assert torch.equal(padded[..., :height, :width], x)
    assert torch.equal(padded[..., height:, :width], x[..., -1:, :].expand(-1, -1, padded.shape[2] - height, -1))


def test_fit_small_and_wrong():
    x = torch.randn(1, 3, 5, 40)
    assert images.fit(x, 32, "pad").shape == (1, 3, 32, 64)
    with pytest.raises(ValueError, match="40x5 pixels; cropping needs at least 32x32"):
        images.fit(x, 32, "crop")
    with pytest.raises(ValueError, match="how='stretch'"):
        images.fit(x, 32, "stretch")


@pytest.mark.parametrize("width", [16, 600])
def test_side_by_side_holds_both_pictures(width):
    left, right = Image.new("RGB", (width, 40), "red"), Image.new("RGB", (width, 40), "blue")
    sheet = images.side_by_side([(left, "original"), (right, "a longer caption than that")], "title")
    pixels = np.asarray(sheet).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == (pixels == (0, 0, 255)).all(1).sum() == width * 40


def test_saving_is_atomic(tmp_path):
    path = tmp_path / "picture.png"
    images.save_png(gradient(), path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), written_atomically(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    # as two threads would, or two nodes with equal pids
    with written_atomically(path) as one, written_atomically(path) as other:
        assert one != other


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "photo.png")
    with pytest.raises(images.PhotographError, match="photo.png: cannot be read as a photograph: not a regular file"):
        images.read_photograph(tmp_path / "photo.png")


def test_suffixes_of_pictures():
    suffixes = images.picture_suffixes()
    assert {".jpg", ".jfif", ".avif", ".jp2", ".mpo", ".webp"} <= suffixes
    assert not {".pdf", ".h5", ".mpg", ".txt", ".json"} & suffixes
