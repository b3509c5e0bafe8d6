"""Finding pictures and classes in tar shards."""

import io
import os
import re
import tarfile

import pytest
import torch
from small_pictures import SIZES, crops, png, save_shard

from dcae_fast.data.find import find_pictures
from dcae_fast.data.shards import MAX_CLASS_NUMBERS
from dcae_fast.errors import DataError


def samples(classes):
    """Members of a shard: one picture for each class, numbered 0, 1, ..."""
    members = {}
    for number, text in enumerate(classes):
        members |= {f"{number}.png": png()} | ({} if text is None else {f"{number}.cls": text})
    return members


@pytest.fixture
def shards(pictures, tmp_path):
    """The pictures in two shards with the class numbers 0, 9 and 10, and other files."""
    numbers = {"cat": 0, "dog": 9, "emu": 10}
    for shard, names in {"x-0": list(SIZES)[:3], "x-1": list(SIZES)[3:]}.items():
        members = {}
        for name in names:
            stem, suffix = name.replace("/", "_").rsplit(".", 1)
            stem = stem.replace(".", "_")
            members[f"./in/{stem}.cls"] = f"{numbers[name[:3]]}\n".encode()
            members[f"./in/{stem}.json"] = b"{}"
            members[f"./in/{stem}.{suffix}"] = (pictures / name).read_bytes()
        save_shard(tmp_path / f"{shard}.tar", members)
    return tmp_path


def test_shards(pictures, shards):
    found = find_pictures(shards)
    assert found.classes == tuple(f"{number:02d}" for number in range(11))
    assert [item.label for item in found.items] == [0, 0, 0, 9, 9, 9, 10]
    assert found.items[1].key == "00/x-0/in/cat_b_b" and found.items[1].name == "x-0.tar/in/cat_b_b.jpg"
    assert found.failed == found.ignored == []
    assert [caption.name for caption in found.items[1].captions] == ["x-0.tar/in/cat_b_b.json"]
    assert torch.equal(crops(found).pixels, crops(find_pictures(pictures)).pixels)
    one = find_pictures(shards / "x-1.tar")
    assert [item.label for item in one.items] == [9, 9, 9, 10]


def test_without_classes_and_corrupt_members(tmp_path):
    save_shard(
        tmp_path / "a.TAR", {"k.txt": b"nothing", "l.input.JPG": b"nothing", "/abs//m.avif": b"", "._n.jpg": b""}
    )
    found = find_pictures(tmp_path)
    assert found.classes == () and [item.key for item in found.items] == ["a/abs/m", "a/l"]
    assert crops(found).failed == [(0, "not a picture that Pillow can read"), (1, "not a picture that Pillow can read")]
    assert sorted(found.ignored) == [("a.TAR/._n.jpg", "hidden"), ("a.TAR/k.txt", "no picture suffix")]


def test_class_names(tmp_path):
    save_shard(tmp_path / "a.tar", samples([b"tench\n", "Käse".encode(), b"tench", b"ant lion"]))
    found = find_pictures(tmp_path)
    assert found.classes == ("Käse", "ant lion", "tench") and [item.label for item in found.items] == [0, 1, 2, 2]
    assert found.items[0].key == "Käse/a/1" and found.class_members["tench"] == "a.tar/0.cls"


def test_large_class_numbers_are_names(tmp_path):
    save_shard(tmp_path / "a.tar", samples([b"9223372036854775807", b"-5", b"7"]))
    found = find_pictures(tmp_path)
    assert found.classes == ("-5", "7", "9223372036854775807") and sorted(found.class_members) == list(found.classes)
    save_shard(tmp_path / "a.tar", samples([str(MAX_CLASS_NUMBERS - 1).encode()]))
    assert [item.label for item in find_pictures(tmp_path).items] == [MAX_CLASS_NUMBERS - 1]


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "0.cls contains nothing"),
        (b" \n", r"0.cls contains ' \n'"),
        (b"\xff\xfe", "0.cls contains"),
        (b"a/b", "0.cls contains 'a/b'"),
        (b"..", "0.cls contains '..'"),
        (b"a\nb", r"0.cls contains 'a\nb'"),
        (b"x" * 300, "0.cls contains 'xxx"),
        (b"-1", "0.cls contains the class number -1; expected at least 0"),
        (None, "has no `.cls` member, although other pictures have one"),
    ],
)
def test_a_sample_without_a_valid_class_fails(tmp_path, text, words):
    save_shard(tmp_path / "a.tar", samples([text, b"1"]))
    found = find_pictures(tmp_path)
    assert [(item.key, item.label) for item in found.items] == [("1/a/1", 1)]
    ((name, reason),) = found.failed
    assert name == "a.tar/0.png" and words in reason


def test_two_class_members(tmp_path):
    save_shard(tmp_path / "a.tar", {"0.cls": b"1", "0.b.cls": b"2", "0.png": png(), "1.cls": b"3", "2.png": png()})
    found = find_pictures(tmp_path)
    assert ("a.tar/0.png", "two members give its class: a.tar/0.cls and a.tar/0.b.cls; expected one") in found.failed
    assert ("a.tar/1.cls", "a class without a picture") in found.ignored and len(found.items) == 1


def test_class_numbers_with_class_names_are_refused(tmp_path):
    save_shard(tmp_path / "a.tar", samples([b"3", b"tench"]))
    with pytest.raises(
        DataError, match=r"a.tar/0.cls contains the class number 3, and a.tar/1.cls the class name 'tench'"
    ):
        find_pictures(tmp_path)


def test_samples_with_two_pictures(tmp_path):
    save_shard(tmp_path / "a.tar", {"0.JPG": png(), "0.seg.png": png(), "1.jpg": png(), "2.seg.png": png()})
    found = find_pictures(tmp_path)
    assert [item.name for item in found.items] == ["a.tar/1.jpg", "a.tar/2.seg.png"]
    assert {name for name, _ in found.failed} == {"a.tar/0.JPG", "a.tar/0.seg.png"}
    assert "sample a/0 has 2 pictures; choose one with --member JPG or --member seg.png" in found.failed[0][1]
    for member, names in {"jpg": ["0.JPG", "1.jpg"], ".seg.PNG": ["0.seg.png", "2.seg.png"]}.items():
        found = find_pictures(tmp_path, member)
        assert [item.name for item in found.items] == [f"a.tar/{name}" for name in names] and found.failed == []
        assert len(found.ignored) == 2 and {reason for _, reason in found.ignored} == {
            f"not --member {member.lower().strip('.')}"
        }


def test_two_members_with_one_name(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.png", "0.png", "1.png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    for member in (None, "png"):
        found = find_pictures(tmp_path, member)
        assert [item.name for item in found.items] == ["a.tar/1.png"]
        reason = "sample a/0 has 2 pictures; some have the same extension; expected one picture per extension"
        assert found.failed == [("a.tar/0.png", reason)] * 2


def test_a_name_that_is_too_long_for_a_file(tmp_path):
    longest = "ä" * 125 + "b.png"  # 255 bytes
    save_shard(tmp_path / "a.tar", {longest: png(), f"a{longest}": png()})
    found = find_pictures(tmp_path)
    assert [item.name for item in found.items] == [f"a.tar/{longest}"]
    assert found.failed == [(f"a.tar/a{longest}", "the file name of its latent would exceed 255 bytes")]


def test_links_and_other_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        file = tarfile.TarInfo("in/0.png")
        file.size = len(png())
        tar.addfile(file, io.BytesIO(png()))
        kinds = {"1.png": (tarfile.LNKTYPE, "in/0.png"), "in/2.png": (tarfile.SYMTYPE, "0.png")}
        kinds |= {"3.png": (tarfile.SYMTYPE, "/etc/passwd"), "4.png": (tarfile.SYMTYPE, "4.png")}
        kinds |= {"5.png": (tarfile.FIFOTYPE, ""), "6.png": (tarfile.DIRTYPE, "")}
        for name, (kind, target) in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        out = tarfile.TarInfo("../7.png")
        tar.addfile(out)
    found = find_pictures(tmp_path)
    assert [item.key for item in found.items] == ["a/1", "a/in/0", "a/in/2"] and len(crops(found).indices) == 3
    assert sorted(name for name, _ in found.failed) == ["a.tar/../7.png", "a.tar/3.png", "a.tar/4.png", "a.tar/5.png"]


@pytest.mark.parametrize("kind", ["torn", "torn header", "damaged", "two", "empty", "garbage", "compressed"])
def test_a_broken_shard_fails_and_the_others_are_read(tmp_path, kind):
    save_shard(tmp_path / "a.tar", {"0.png": png(), "1.png": png()})
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as tar:
        tar.add(tmp_path / "a.tar")
    compressed = (tmp_path / "gz.tar").read_bytes()
    (tmp_path / "gz.tar").unlink()
    broken = {"torn": whole[:1600], "torn header": whole[:1300], "damaged": whole[:1024] + b"x" + whole[1025:]}
    broken |= {"two": whole + whole, "empty": b"", "garbage": b"x" * 700, "compressed": compressed}
    (tmp_path / "b.tar").write_bytes(broken[kind])
    found = find_pictures(tmp_path)
    assert [item.key for item in found.items] == ["a/0", "a/1"]
    assert [name for name, _ in found.failed] == ["b.tar"]
    assert re.match("not a readable, uncompressed tar file: ", found.failed[0][1])


def test_a_pipe_is_not_a_shard(tmp_path):
    save_shard(tmp_path / "a.tar", {"0.png": png()})
    os.mkfifo(tmp_path / "b.tar")
    assert [name for name, _ in find_pictures(tmp_path).failed] == ["b.tar"]
