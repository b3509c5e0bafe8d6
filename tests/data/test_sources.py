"""Pictures that changed or disappeared since their latents were encoded."""

import json
import os

import pytest
from PIL import Image
from small_pictures import contents, png, run, save_shard

from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.manifest import MANIFEST, load_manifest
from dcae_fast.data.sources import SOURCES

pytestmark = pytest.mark.usefixtures("small_shards")


def paint(path, colour, *times):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)
    os.utime(path, ns=times or None)


@pytest.mark.parametrize("format", ["npy", "safetensors"])
@pytest.mark.parametrize("when", [1, 4 * 10**18])
def test_changed_pictures_are_encoded_again(tmp_path, capsys, format, when):
    for name in "abcd":
        paint(tmp_path / "p" / f"{name}.png", "red", 10**18, 10**18)
    command = tmp_path / "p", tmp_path / "out", "--format", format
    assert run(*command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob(f"*.{format}")}
    paint(tmp_path / "p" / "b.png", "blue", when, when)
    capsys.readouterr()
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "1 pictures changed" in printed and "1 latents in" in printed and "3 latents existed" in printed
    unchanged = sum(path.stat().st_mtime_ns == time for path, time in before.items())
    assert unchanged == (3 if format == "npy" else 1)
    assert run(tmp_path / "p", tmp_path / "new", "--format", format) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    (tmp_path / "p" / "c.png").write_bytes(b"")  # its old latent is removed
    assert run(*command) == 1 and len(LatentDataset(tmp_path / "out")) == 3


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_members_that_changed(tmp_path, format):
    red, white = png(64, 64), png(64, 64).replace(b"IDAT", b"IDAt")
    command = tmp_path / "a.tar", tmp_path / "out", "--format", format
    save_shard(tmp_path / "a.tar", {"0.png": white, "1.png": white})
    os.utime(tmp_path / "a.tar", (1, 1))
    assert run(*command) == 1
    save_shard(tmp_path / "a.tar", {"0.png": red, "1.png": red})
    os.utime(tmp_path / "a.tar", (2, 2))
    assert run(*command) == 0
    assert LatentDataset(tmp_path / "out").manifest.latents == 2


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_pictures_that_became_unreadable(tmp_path, format):
    for name in "ab":
        save_shard(tmp_path / "p" / f"{name}.tar", {"0.png": png(64, 64), "1.png": png(64, 64)})
    command = tmp_path / "p", tmp_path / "out", "--format", format
    assert run(*command) == 0
    (tmp_path / "p" / "a.tar").write_bytes(b"torn")
    save_shard(tmp_path / "p" / "b.tar", {"0.png": png(64, 64), "1.png": png(64, 64), "1.jpg": png(64, 64)})
    assert run(*command) == 1
    assert load_manifest(tmp_path / "out").skipped == ("a.tar", "b.tar/1.png", "b.tar/1.jpg")
    assert len(LatentDataset(tmp_path / "out")) == 1


@pytest.mark.parametrize("before, after", [("npy", "safetensors"), ("safetensors", "npy")])
def test_overwrite(pictures, tmp_path, before, after):
    assert run(pictures / "cat", tmp_path / "out", "--format", before) == 0
    again = ["--format", after, "--scale", "0.25"]
    assert run(pictures / "emu", tmp_path / "out", *again, "--overwrite") == 0
    assert run(pictures / "emu", tmp_path / "new", *again) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
    (tmp_path / "out" / MANIFEST).unlink()
    # without a manifest, nothing shows that the files may be deleted
    assert run(pictures / "emu", tmp_path / "out", *again, "--overwrite") == 2


def test_a_folder_of_an_earlier_version(pictures, tmp_path, capsys):
    """The folder has no sources.json, and its pictures were read as the original reads them."""
    assert run(pictures / "cat", tmp_path / "out", "--as-original") == 0
    (tmp_path / "out" / SOURCES).unlink()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    del manifest["ignored"], manifest["settings"]["as_original"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    assert run(pictures / "cat", tmp_path / "out") == 2
    assert "as_original True, not False; give the options of these latents" in capsys.readouterr().err
    assert run(pictures / "cat", tmp_path / "out", "--as-original") == 0
    assert "3 latents existed already" in capsys.readouterr().out


def test_an_invalid_sources_file(pictures, tmp_path, capsys):
    assert run(pictures / "emu", tmp_path) == 0
    (tmp_path / SOURCES).write_text('{"f": ["f.png", 1]}')
    assert run(pictures / "emu", tmp_path) == 2
    assert (
        f"{tmp_path / SOURCES}: cannot be read: expected [name, size, time] for each picture" in capsys.readouterr().err
    )
    assert run(pictures / "emu", tmp_path, "--overwrite") == 0
