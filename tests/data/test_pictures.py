"""Pictures found in folders and in tar shards, and their crops."""

import io
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import BROKEN, SIZES

from dcae_fast.data.manifest import DataError
from dcae_fast.data.pictures import CropDataset, collate, find_pictures


def crops(pictures):
    return collate(list(CropDataset(pictures, range(len(pictures.items)), 64)))


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(pictures, tmp_path):
    """The pictures in two shards, with class numbers 0, 9 and 10 and further files."""
    numbers = {"cat": 0, "dog": 9, "emu": 10}
    for shard, names in {"x-0": list(SIZES)[:3], "x-1": list(SIZES)[3:]}.items():
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for name in names:
                stem, suffix = name.replace("/", "_").rsplit(".", 1)
                stem = stem.replace(".", "_")
                add(tar, f"./in/{stem}.cls", f"{numbers[name[:3]]}\n".encode())
                add(tar, f"./in/{stem}.json", b"{}")
                add(tar, f"./in/{stem}.{suffix}", (pictures / name).read_bytes())
    return tmp_path


def test_class_folders(pictures):
    found = find_pictures(pictures)
    assert [item.name for item in found.items] == sorted([*SIZES, BROKEN])
    assert found.classes == ("cat", "dog", "emu")
    assert [found.classes[item.label] for item in found.items] == [item.name[:3] for item in found.items]
    assert found.items[1].key == "cat/b.b"


def test_flat(pictures):
    found = find_pictures(pictures / "cat")
    assert [item.name for item in found.items] == ["a.png", "b.b.jpg", "c.png"]
    assert found.classes == () and {item.label for item in found.items} == {0}


def test_crops(pictures):
    found = find_pictures(pictures)
    batch = crops(found)
    assert [found.items[index].name for index, _ in batch.failed] == [BROKEN] and "truncated" in batch.failed[0][1]
    assert [found.items[index].name for index in batch.indices] == sorted(SIZES)
    assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape == (len(SIZES), 64, 64, 3)
    with Image.open(pictures / "cat/a.png") as image:  # has the size already
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


def test_shards(pictures, shards):
    found = find_pictures(shards)
    assert found.classes == tuple(f"{number:02d}" for number in range(11))
    assert [item.label for item in found.items] == [0, 0, 0, 9, 9, 9, 10]
    assert found.items[1].key == "00/x-0/in/cat_b_b" and found.items[1].name == "x-0.tar/./in/cat_b_b.jpg"
    assert torch.equal(crops(found).pixels, crops(find_pictures(pictures)).pixels)
    one = find_pictures(shards / "x-1.tar")
    assert [item.label for item in one.items] == [9, 9, 9, 10]


def test_shards_without_classes(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "k.txt", b"nothing")
        add(tar, "l.input.JPG", b"nothing")
    found = find_pictures(tmp_path)
    assert found.classes == () and [item.key for item in found.items] == ["a/l"]
    assert len(crops(found).failed) == 1


def test_modes(tmp_path):
    """Grey of 16 bits is that of 8; others as torchvision has them."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    Image.fromarray(grey).save(tmp_path / "narrow.png")
    Image.fromarray(np.dstack([grey] * 3 + [grey])).save(tmp_path / "transparent.png")
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tiff")
    items = dict(CropDataset(find_pictures(tmp_path), range(4), 16)[number] for number in range(4))
    expected = torch.from_numpy(grey)[..., None].expand(16, 16, 3)
    assert items.pop(0) == "its pixels are floating point, which has no defined range"
    assert all(torch.equal(pixels, expected) for pixels in items.values()) and len(items) == 3


def test_refused(pictures, tmp_path):
    def refuse(words):
        with pytest.raises(DataError, match=re.escape(words)):
            find_pictures(tmp_path)

    refuse("no pictures here")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").touch()
    (tmp_path / "c" / "a.jpg").touch()
    refuse("would both have the latent c/a")
    (tmp_path / "b.png").touch()
    refuse("b.png: beside class folders")
    shutil.rmtree(tmp_path / "c")
    (tmp_path / "torn.tar").write_bytes(b"x" * 700)
    refuse("b.png: beside shards")
    (tmp_path / "b.png").unlink()
    refuse("torn.tar: not a readable shard")
    with tarfile.open(tmp_path / "torn.tar", "w") as tar:
        add(tar, "a.cls", b"3")
        add(tar, "a.png", b"")
        add(tar, "b.png", b"")
    refuse("b.png: no class number")
    with tarfile.open(tmp_path / "torn.tar", "w") as tar:
        add(tar, "../../a.png", b"")
    refuse("torn.tar: not a readable shard: ../../a.png leaves its folder")
    with pytest.raises(DataError, match="no such folder"):
        find_pictures(tmp_path / "elsewhere")
