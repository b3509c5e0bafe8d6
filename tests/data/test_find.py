"""Finding pictures in folders. For shards, see test_shards."""

import os
import re
import shutil

import pytest
from PIL import Image
from small_pictures import BROKEN, SIZES, png, save_shard

from dcae_fast.data.find import find_pictures
from dcae_fast.errors import DataError


def test_class_folders(pictures):
    found = find_pictures(pictures)
    assert [item.name for item in found.items] == sorted([*SIZES, BROKEN])
    assert found.classes == ("cat", "dog", "emu")
    assert [found.classes[item.label] for item in found.items] == [item.name[:3] for item in found.items]
    assert found.items[1].key == "cat/b.b" and found.failed == found.ignored == []


def test_flat(pictures):
    found = find_pictures(pictures / "cat")
    assert [item.name for item in found.items] == ["a.png", "b.b.jpg", "c.png"]
    assert found.classes == () and {item.label for item in found.items} == {0}


def test_all_formats_of_pillow_are_found_and_other_files_listed(tmp_path):
    kinds = {"a.JPG": "JPEG", "b.jfif": "JPEG", "c.avif": "AVIF", "d.jpe": "JPEG", "e.jp2": "JPEG2000", "f.mpo": "JPEG"}
    for name, kind in kinds.items():
        Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    for name in ("notes.txt", "g.mp4", ".h.png", "scan.pdf", "none"):
        (tmp_path / name).touch()
    found = find_pictures(tmp_path)
    assert [item.name for item in found.items] == list(kinds)
    assert sorted(found.ignored) == [
        (".h.png", "hidden"),
        ("g.mp4", "no picture suffix"),
        ("none", "no picture suffix"),
        ("notes.txt", "no picture suffix"),
        ("scan.pdf", "no picture suffix"),
    ]


def test_duplicate_stems_and_unreadable_files_fail(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "c.png").symlink_to("absent.png")
    os.mkfifo(tmp_path / "d.png")
    found = find_pictures(tmp_path)
    assert [item.name for item in found.items] == ["b.png"]
    assert dict(found.failed) == {
        "a.jpg": "a.jpg, a.png would share the latent a; expected unique names",
        "a.png": "a.jpg, a.png would share the latent a; expected unique names",
        "c.png": "No such file or directory",
        "d.png": "not a regular file",
    }


def test_sizes_and_times(tmp_path):
    (tmp_path / "a.png").write_bytes(b"123")
    os.utime(tmp_path / "a.png", ns=(5, 7))
    assert [(item.size, item.time) for item in find_pictures(tmp_path).items] == [(3, 7)]


def test_ambiguous_or_empty_folders_are_refused(tmp_path):
    def refuse(words, *options):
        with pytest.raises(DataError, match=re.escape(words)):
            find_pictures(tmp_path, *options)

    refuse("found no usable pictures")
    (tmp_path / "notes.txt").touch()
    refuse(f"{tmp_path / 'notes.txt'}: no picture suffix")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.png").touch()
    refuse(f"--member jpg: expected .tar shards in {tmp_path}, found none", "jpg")
    (tmp_path / "c" / "a.jpg").touch()
    refuse("would share the latent c/a")
    (tmp_path / "b.png").touch()
    refuse("b.png: picture beside class folders")
    shutil.rmtree(tmp_path / "c")
    save_shard(tmp_path / "a.tar", {"a.png": png()})
    refuse("b.png: picture beside .tar shards")
    with pytest.raises(DataError, match="expected a folder or a .tar file, found neither"):
        find_pictures(tmp_path / "elsewhere")
