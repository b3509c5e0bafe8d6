"""Listing the files below a folder: each once, with ignored and failed ones."""

import os

import pytest

from dcae_fast.data.folders import list_files


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_order_and_hidden_files(tmp_path):
    touch(tmp_path, "a.b/1", "a/2", "a/10", "0", ".git/config", "a/._2")
    listing = list_files(tmp_path)
    assert listing.files == ["0", "a/10", "a/2", "a.b/1"] and listing.failed == []
    assert listing.ignored == [(".git/", "hidden"), ("a/._2", "hidden")]


def test_a_folder_is_listed_once(tmp_path):
    root = tmp_path / "root"
    touch(root, "cat/1", "cat/deep/2")
    touch(tmp_path / "elsewhere", "3", "more/4")
    links = {"alias": root / "cat", "cat/up": root, "cat/deep/up": root / "cat", "above": tmp_path, "slash": "/"}
    links |= {"other": tmp_path / "elsewhere", "other-again": tmp_path / "elsewhere" / "more"}
    for name, target in links.items():
        (root / name).symlink_to(target, target_is_directory=True)
    listing = list_files(root)
    assert listing.files == ["cat/1", "cat/deep/2", "other/3", "other/more/4"]
    assert {name for name, _ in listing.ignored} == {f"{name}/" for name in links if name != "other"}


def test_file_links_and_dangling_links_are_files(tmp_path):
    touch(tmp_path, "1")
    for name, target in {"2": "1", "3": "absent", "4": "4"}.items():
        (tmp_path / name).symlink_to(target)
    assert list_files(tmp_path).files == ["1", "2", "3", "4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read(tmp_path):
    touch(tmp_path, "a/1", "b/2")
    (tmp_path / "b").chmod(0)
    assert list_files(tmp_path).failed == [("b/", "Permission denied")]
    (tmp_path / "b").chmod(0o700)


def test_suffixes_in_any_case(tmp_path):
    touch(tmp_path, "a.JPG", "b.jpg", "c.Png", "d")
    assert list_files(tmp_path).with_suffix(".jpg", ".png") == ["a.JPG", "b.jpg", "c.Png"]
