"""Centre crops of pictures."""

import numpy as np
import torch
from PIL import Image
from small_pictures import BROKEN, SIZES, crops

from dcae_fast import images
from dcae_fast.data.find import find_pictures
from dcae_fast.data.pictures import CropDataset, collate, to_rgb


def test_crops(pictures):
    found = find_pictures(pictures)
    batch = crops(found)
    assert [found.items[index].name for index, _ in batch.failed] == [BROKEN] and "truncated" in batch.failed[0][1]
    assert [found.items[index].name for index in batch.indices] == sorted(SIZES)
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (len(SIZES), 64, 64, 3)
    with Image.open(pictures / "cat/a.png") as image:  # already has the target size
        assert np.array_equal(batch.pixels[0], np.asarray(image))


def test_crops_as_the_original(reference, open_case, tmp_path):
    case = open_case("pipeline", "")
    for number, each in enumerate(case.file_meta["dm_crop"]):
        if isinstance(each["target"], int):
            tensors = case.tensors(f"dm_crop/{each['index']}")
            folder = tmp_path / str(number)
            folder.mkdir()
            Image.fromarray(tensors["image"].numpy()).save(folder / "one.png")
            _, crop = CropDataset(find_pictures(folder), [0], each["target"])[0]
            assert torch.equal(crop, tensors["crop"]), each


def test_modes(tmp_path):
    """16-bit grey becomes 8-bit grey; other modes are converted as torchvision converts them."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    Image.fromarray(grey).save(tmp_path / "narrow.png")
    Image.fromarray(np.dstack([grey] * 3 + [grey])).save(tmp_path / "transparent.png")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    items = dict(CropDataset(find_pictures(tmp_path), range(4), 16)[number] for number in range(4))
    expected = torch.from_numpy(grey)[..., None].expand(16, 16, 3)
    assert items.pop(0) == "has floating-point pixels, whose range is not defined; expected integer pixels"
    assert all(torch.equal(pixels, expected) for pixels in items.values()) and len(items) == 3


def turned_and_transparent(folder):
    """A photograph that is to be turned by 90 degrees, one that is transparent on the left, and one of 16 bits."""
    folder.mkdir()
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).convert("RGB").save(folder / "turned.png", exif=exif)
    alpha = np.where(np.arange(16) < 8, 0, 255).astype(np.uint8)[None].repeat(16, 0)
    Image.fromarray(np.dstack([grey, alpha])).save(folder / "transparent.png")
    palette = Image.fromarray(grey).convert("P")
    palette.save(folder / "palette.png", transparency=3)
    Image.fromarray(grey).convert("CMYK").save(folder / "ink.tiff")
    Image.fromarray(grey.astype(np.uint16) * 257 - 100).save(folder / "wide.png")
    frames = [Image.fromarray(grey), Image.new("L", (16, 16))]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])


def test_crops_as_seen_equal_what_encode_reads(tmp_path):
    turned_and_transparent(tmp_path / "p")
    found = find_pictures(tmp_path / "p")
    batch = collate(list(CropDataset(found, range(6), 16, images.as_seen)))
    assert batch.failed == [] and batch.pixels.dtype == torch.float32  # one picture has 16 bits
    for picture, crop in zip(found.items, batch.pixels, strict=True):
        expected = images.read_photograph(tmp_path / "p" / picture.name)
        assert torch.equal(
            images.to_tensor(Image.fromarray(crop[..., 0].numpy())), expected[:, :1].expand(1, 3, 16, 16)
        )
    only_8_bits = collate(list(CropDataset(found, range(5), 16, images.as_seen)))
    assert only_8_bits.pixels.dtype == torch.uint8


def test_crops_as_the_original_are_not_rotated(tmp_path):
    turned_and_transparent(tmp_path / "p")
    found = find_pictures(tmp_path / "p")
    as_original, as_seen = (
        dict(zip([p.name for p in found.items], CropDataset(found, range(6), 16, prepare), strict=True))
        for prepare in (to_rgb, images.as_seen)
    )
    differs = {
        name for name, (_, crop) in as_original.items() if not torch.equal(crop, as_seen[name][1].round().byte())
    }
    assert differs == {"turned.png", "transparent.png", "palette.png"}


def test_too_large_pictures_are_reported(tmp_path):
    for name, size in {"small": (16, 16), "large": (40, 40), "long": (1, 60)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    found = find_pictures(tmp_path)
    limited = [reason for _, reason in CropDataset(found, range(3), 16, max_pixels=1599)]
    assert limited[0] == "has more than 1599 pixels; --max-pixels raises the limit"
    assert limited[1] == (
        "resizing 1x60 pixels to 16x960 before cropping gives more than 1599 pixels; --max-pixels raises the limit"
    )
    assert limited[2].shape == (16, 16, 3)
    before = Image.MAX_IMAGE_PIXELS
    assert all(isinstance(crop, torch.Tensor) for _, crop in CropDataset(found, range(3), 16))
    assert before == Image.MAX_IMAGE_PIXELS
