"""Captions beside the pictures, in folders and in shards, and captions.json."""

import json
import os
import re

import pytest
from small_pictures import png, run, save_noise, save_shard

from dcae_fast.data.captions import CAPTIONS, load_captions, read_captions
from dcae_fast.data.find import find_pictures
from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.manifest import load_manifest
from dcae_fast.errors import DataError

TEXTS = {
    "a.txt": "a red cat, größer\n".encode(),
    "a.json": b'{"caption": "not used"}',
    "b.json": b'{"key": "b", "caption": " two dogs "}',
    "c.txt": b"  ",
    "c.json": b'{"caption": "from the second file"}',
    "d.json": b'{"caption": null}',
    "e.txt": b"\xff\xfe\xfa",
    "f.txt": "\ufeffwith a mark".encode(),
    "g.json": b"[1",
    "h.json": b'{"caption": "\\ud800 half a pair"}',
    "i.json": b"[" * 100_000,
}
EXPECTED = {"a": "a red cat, größer", "b": "two dogs", "c": "from the second file", "f": "with a mark"}
UNUSABLE = {"c.txt": "empty", "d.json": 'a text "caption"', "e.txt": "can't decode", "g.json": "Expecting"}
UNUSABLE |= {"h.json": "surrogates not allowed", "i.json": "recursion"}


@pytest.mark.parametrize("kind", ["folder", "shard"])
def test_found(tmp_path, kind):
    members = TEXTS | {f"{key}.png": png() for key in "abcdefghij"} | {"a.b.txt": b"of no picture", "x.txt": b"none"}
    if kind == "shard":
        save_shard(tmp_path / "s.tar", members)
    else:
        for name, content in members.items():
            (tmp_path / name).write_bytes(content)
    pictures, prefix = find_pictures(tmp_path), {"shard": "s.tar/", "folder": ""}[kind]
    found = read_captions(pictures)
    assert {key.removeprefix("s/"): text for key, text in found.captions.items()} == EXPECTED
    reasons = {name.removeprefix(prefix): reason for name, reason in found.unusable}
    assert reasons.keys() == UNUSABLE.keys() and all(UNUSABLE[name] in reasons[name] for name in reasons)
    assert sorted(pictures.ignored) == [(f"{prefix}{name}", "no picture suffix") for name in ("a.b.txt", "x.txt")]


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_recorded_and_read_again(tmp_path, capsys, format):
    for seed, name in enumerate(["x/a", "x/b", "y/c"]):
        save_noise(tmp_path / "p" / f"{name}.png", 64, 64, seed)
    (tmp_path / "p" / "x" / "a.txt").write_text("one")
    (tmp_path / "p" / "y" / "c.json").write_text("{}")
    command = tmp_path / "p", tmp_path / "out", "--format", format
    assert run(*command) == 0
    expected = '\n1 captions\nno caption in y/c.json (expected an object with a text "caption")\n'
    assert expected in capsys.readouterr().out
    manifest = load_manifest(tmp_path / "out")
    assert manifest.captions == 1 and manifest.ignored == ("y/c.json",)
    data, captions = LatentDataset(tmp_path / "out"), load_captions(tmp_path / "out")
    assert [captions.get(data.key(index)) for index in range(3)] == ["one", None, None]
    (tmp_path / "p" / "x" / "a.txt").unlink()
    (tmp_path / "p" / "y" / "c.json").write_text('{"caption": "two"}')
    assert run(*command) == 0 and "3 latents existed already" in capsys.readouterr().out
    assert load_captions(tmp_path / "out") == {"y/c": "two"}
    (tmp_path / "p" / "y" / "c.json").unlink()
    assert run(*command) == 0 and not (tmp_path / "out" / CAPTIONS).exists()


def test_a_pipe_is_no_caption(tmp_path):
    save_noise(tmp_path / "a.png", 8, 8, 0)
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text('{"caption": "from the file"}')
    found = read_captions(find_pictures(tmp_path))
    assert found.captions == {"a": "from the file"}
    assert found.unusable == [("a.txt", "not a regular file")]


@pytest.mark.parametrize("content", ["{", json.dumps({"a": 1}), "[]", "[" * 10**5], ids=len)
def test_a_damaged_file(tmp_path, content):
    (tmp_path / CAPTIONS).write_text(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / CAPTIONS))):
        load_captions(tmp_path)
