"""cache-latents --buckets: the sizes, the bucket of each picture, resuming, and refused requests."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from small_pictures import BROKEN, SIZES, arguments, contents, png, run, save_noise, save_shard
from test_ranks import free_port, run_ranks, start

from dcae_fast import cli, images
from dcae_fast.data import store
from dcae_fast.data.buckets import Bucket, bucket_sizes, in_buckets, nearest
from dcae_fast.data.captions import load_captions
from dcae_fast.data.find import find_pictures
from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.manifest import MANIFEST, load_manifest
from dcae_fast.images import MAX_PIXELS
from dcae_fast.models.autoencoder import DCAE

pytestmark = pytest.mark.usefixtures("small_shards")
RESOLUTION = 128, 32  # with the bundled model's ratio
FORMATS = pytest.mark.parametrize("format", ["npy", "safetensors"])


def cache(pictures, out, *options) -> int:
    return run(pictures, out, "--resolution", RESOLUTION[0], "--buckets", *options)


@pytest.mark.parametrize(
    "resolution, ratio", [(1024, 32), (512, 64), (256, 32), (4096, 32), (128, 32), (64, 32), (64, 64)]
)
def test_sizes(resolution, ratio):
    buckets = bucket_sizes(resolution, ratio)
    assert (resolution, resolution) in buckets and list(buckets) == sorted(set(buckets))
    assert {(width, height) for height, width in buckets} == set(buckets)
    for height, width in buckets:
        assert height % ratio == width % ratio == 0
        assert 1 / 4 <= height / width <= 4 and abs(height * width / resolution**2 - 1) <= 0.1
    if resolution >= 16 * ratio:  # any ratio of sides up to 4 is near one of a bucket
        for aspect in np.geomspace(1 / 4, 4, 200):
            height, width = nearest(buckets, 1000 * aspect, 1000)
            assert abs(np.log(height / width / aspect)) < 2.2 * ratio / resolution


def test_sizes_stay_as_they_are():
    """Folders of latents depend on the rule, which must not change."""
    names = [bucket.name for bucket in bucket_sizes(*RESOLUTION)]
    assert names == ["256x64", "160x96", "128x128", "96x160", "64x256"]
    assert len(bucket_sizes(1024, 32)) == 33 and bucket_sizes(1024, 32)[16] == (1024, 1024)
    assert Bucket(832, 1248) in bucket_sizes(1024, 32)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "bmp", "gif"])
@pytest.mark.parametrize("as_original", [False, True])
def test_the_bucket_of_a_rotated_picture(tmp_path, suffix, as_original):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if suffix in ("bmp", "gif") else {"exif": exif}
    Image.new("RGB", (60, 20)).save(tmp_path / f"a.{suffix}", **options)
    pictures = find_pictures(tmp_path)
    found = in_buckets(pictures, bucket_sizes(*RESOLUTION), as_original, MAX_PIXELS, 0)
    seen = pictures.read(0, (lambda image: image.convert("RGB")) if as_original else images.as_seen, MAX_PIXELS)
    (bucket,) = [bucket for bucket, part in found.items() if part.items]
    assert bucket == ((64, 256) if seen.width > seen.height else (256, 64)) and not pictures.failed


@FORMATS
def test_latents_and_captions(tmp_path, capsys, format):
    """The latents equal the model's, of pictures resized to cover the bucket and cropped to its centre."""
    sizes = {
        "x/a": (300, 90),
        "x/b": (128, 128),
        "y/c": (150, 300),
        "y/d": (310, 200),
        "y/e": (100, 500),
        "y/f": (70, 71),
    }
    for seed, (name, size) in enumerate(sizes.items()):
        save_noise(tmp_path / "p" / f"{name}.png", *size, seed)
    (tmp_path / "p" / "y" / "f.txt").write_text("a square")
    (tmp_path / "p" / "x" / "z.png").write_bytes(b"broken")
    assert cache(tmp_path / "p", tmp_path / "out", "--format", format) == 1
    output = capsys.readouterr()
    assert "5 sizes: 256x64, 160x96, 128x128, 96x160, 64x256" in output.out and "x/z.png: not a picture" in output.err
    whole, model = load_manifest(tmp_path / "out"), DCAE.from_pretrained("dc-ae-tiny")
    assert (whole.images, whole.latents, whole.captions, whole.skipped) == (7, 6, 1, ("x/z.png",))
    found = {}
    for name in whole.buckets:
        data, captions = LatentDataset(tmp_path / "out" / name), load_captions(tmp_path / "out" / name)
        assert data.classes == ("x", "y") and data.manifest.latents == len(data)
        width, height = map(int, name.split("x"))
        assert data.shape == (64, height // 32, width // 32)
        for index, (latent, label) in enumerate(data):
            key = data.key(index)
            found[key] = name
            with Image.open(tmp_path / "p" / f"{key}.png") as image, torch.inference_mode():
                expected = model.encode(images.to_tensor(images.centre_crop(image, height, width)))[0] * 0.5
            assert (latent - expected).norm() <= 1e-5 * expected.norm() and data.classes[label] == key[0]
        assert captions == ({"y/f": "a square"} if name == "128x128" else {})
    expected = {"x/a": "256x64", "x/b": "128x128", "y/c": "96x160", "y/d": "160x96", "y/e": "64x256", "y/f": "128x128"}
    assert found == expected


@FORMATS
def test_resumed_and_moved(tmp_path, capsys, format):
    for seed, size in enumerate([(300, 90)] * 4 + [(128, 128)] * 2 + [(90, 300)]):
        save_noise(tmp_path / "p" / f"{seed}.png", *size, seed)
    command = tmp_path / "p", tmp_path / "out", "--format", format
    assert cache(*command) == 0
    before = contents(tmp_path / "out")
    assert cache(*command) == 0 and contents(tmp_path / "out") == before
    assert "\n7 latents existed already" in capsys.readouterr().out
    for seed, size in {3: (128, 128), 6: (128, 128)}.items():  # a second shard and a bucket become empty
        save_noise(tmp_path / "p" / f"{seed}.png", *size, 10 + seed)
    assert cache(*command) == 0
    assert load_manifest(tmp_path / "out").buckets == ("256x64", "128x128")
    assert cache(tmp_path / "p", tmp_path / "new", "--format", format) == 0
    again = {name: content for name, content in contents(tmp_path / "out").items() if not name.startswith("64x256/")}
    assert again == contents(tmp_path / "new")


def test_overwritten_with_other_options(tmp_path, capsys):
    for seed, size in enumerate([(300, 90), (128, 128)]):
        save_noise(tmp_path / "p" / f"{seed}.png", *size, seed)
    whole, out = (tmp_path / "p", tmp_path / "out"), tmp_path / "out"
    assert cache(*whole, "--format", "safetensors") == 0
    before = contents(out)
    for options, words in [(["--scale", "0.25"], "scaling_factor 0.5"), (["--resolution", "64"], "resolution 128")]:
        assert cache(*whole, "--format", "safetensors", *options) == 2
        assert f"{out} contains latents with {words}" in capsys.readouterr().err
    assert run(*whole, "--format", "safetensors", "--resolution", "128") == 2
    assert "contains latents with buckets True, not False" in capsys.readouterr().err and contents(out) == before
    assert cache(*whole, "--resolution", "256", "--overwrite") == 0
    assert cache(tmp_path / "p", tmp_path / "new", "--resolution", "256") == 0
    assert contents(out) == contents(tmp_path / "new")
    assert run(*whole, "--overwrite") == 0 and len(LatentDataset(out)) == 2
    assert not any("/" in name for name in contents(out))


def test_not_read_as_one_folder(tmp_path, capsys):
    save_noise(tmp_path / "p" / "a.png", 300, 90, 0)
    assert cache(tmp_path / "p", tmp_path / "out") == 0
    train = ["train-diffusion", "uvit-h-f64", "--out", str(tmp_path / "run"), "--device", "cpu", "--data"]
    assert cli.main([*train, str(tmp_path / "out")]) == 2
    assert (
        f"{tmp_path / 'out'}: contains latents of several sizes, one folder for each (256x64)"
        in capsys.readouterr().err
    )
    assert cli.main([*train, str(tmp_path / "out" / "256x64")]) == 2
    assert "latents of 2x8; expected squares" in capsys.readouterr().err and not any((tmp_path / "run").glob("*/*"))


def test_killed(tmp_path):
    for seed in range(24):
        save_noise(tmp_path / "p" / f"{seed}.png", *[(300, 90), (128, 128), (90, 300)][seed % 3], seed)
    command = [*arguments(tmp_path / "p", tmp_path / "out"), "--resolution", "128", "--buckets"]
    process = multiprocessing.get_context("fork").Process(target=cli.main, args=(command,))
    process.start()
    while sum(1 for _ in (tmp_path / "out").rglob("*.npy")) < 11:  # in the second bucket
        assert process.is_alive(), "it was over too soon to be killed"
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = contents(tmp_path / "out")
    assert load_manifest(tmp_path / "out").latents is None
    assert cli.main(command) == 0
    whole = contents(tmp_path / "out")
    assert cache(tmp_path / "p", tmp_path / "whole") == 0 and contents(tmp_path / "whole") == whole
    assert len(left) < len(whole) and all(whole[name] == left[name] for name in left if name.endswith("npy"))


def test_two_ranks(pictures, tmp_path, monkeypatch):
    shutil.copytree(pictures, tmp_path / "p")
    (tmp_path / "p" / "cat" / "a.txt").write_text("a cat")
    options = ["--resolution", "128", "--buckets"]
    commands = [[*arguments(tmp_path / "p", tmp_path / f), *options, "--format", f] for f in ("npy", "safetensors")]
    run_ranks(start, 2, free_port(), tmp_path, commands)
    logs = [json.loads((tmp_path / f"2-{rank}.json").read_text()) for rank in range(2)]
    assert all(log["statuses"] == [1, 1] and log["written"] for log in logs)
    monkeypatch.setattr(store.ShardStore, "unit", 3)
    for format in ("npy", "safetensors"):
        assert cache(tmp_path / "p", tmp_path / "one", "--format", format, "--overwrite") == 1
        assert contents(tmp_path / format) == contents(tmp_path / "one")
    manifest = load_manifest(tmp_path / "npy")
    assert manifest.latents == len(SIZES) and manifest.captions == 1 and manifest.skipped == (BROKEN,)


def test_shards_of_pictures(tmp_path):
    members = {"a.png": png(300, 90), "a.txt": b"wide", "b.png": png(128, 128), "b.json": b'{"caption": "square"}'}
    save_shard(tmp_path / "p" / "s.tar", members)
    assert cache(tmp_path / "p", tmp_path / "out", "--format", "safetensors") == 0
    buckets = load_manifest(tmp_path / "out").buckets
    assert buckets == ("256x64", "128x128") and json.loads((tmp_path / "out" / MANIFEST).read_text())["captions"] == 2
    captions = [load_captions(tmp_path / "out" / name) for name in buckets]
    assert captions == [{"s/a": "wide"}, {"s/b": "square"}]
