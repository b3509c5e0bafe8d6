"""Random crops: functions of seed, step and place; small and broken pictures are named."""

import io
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_autoencoders import CPU, PICTURES, SIZE, recipe, run_in

from dcae_fast.errors import DataError
from dcae_fast.images import MAX_PIXELS
from dcae_fast.training.autoencoder.pictures import CropOrder, Drawn, RandomCrops, usable_pictures
from dcae_fast.training.autoencoder.task import AutoencoderTask


@pytest.fixture
def run(shared, tmp_path):
    shutil.copytree(shared / "pictures", tmp_path / "pictures")
    return run_in(tmp_path / "run")


def crops(shared, run, **options) -> RandomCrops:
    chosen = recipe(shared, "full", **options)
    pictures, _ = usable_pictures(chosen, run)
    return RandomCrops(pictures, chosen, MAX_PIXELS)


@pytest.mark.parametrize("pictures, batch", [(10, 4), (3, 8), (1, 4)])
def test_ranks_share_the_same_batches(pictures, batch):
    steps = range(3, 9)
    (whole,) = [list(CropOrder(pictures, batch, 1, 0, steps, 0, 1))]
    parts = [CropOrder(pictures, batch, 1, 0, steps, rank, 2) for rank in range(2)]
    assert [sum(batch, start=[]) for batch in zip(*parts, strict=True)] == whole
    assert [item.place for item in whole[0]] == list(range(batch)) and whole[0][0].step == 3
    assert {item.number for batch in whole for item in batch} <= set(range(pictures))


def test_workers_change_nothing(shared, run):
    batches = []
    for workers in (0, 2):
        task = AutoencoderTask(recipe(shared, "full"), replace(run, workers=workers), CPU)
        batches.append(torch.stack(list(task.batches(range(2, 5), 1))))
    assert torch.equal(*batches) and batches[0].shape == (3, 4, 32, 32, 3) and batches[0].dtype == torch.uint8


def test_draws(shared, run):
    """Other steps and places give other crops of a picture; half of the crops are mirrored."""
    dataset, ramp = crops(shared, run), np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    seen = {dataset[Drawn(step, place, 0)].numpy().tobytes() for step in range(4) for place in range(4)}
    assert len(seen) > 8
    Image.fromarray(np.sort(ramp % 200, axis=1)).convert("RGB").save(run.data / "0.png")  # brighter to the right
    mirrored = [
        (item[:, 0].float().mean() > item[:, -1].float().mean()).item()
        for item in (dataset[Drawn(step, 0, 0)] for step in range(40))
    ]
    assert 10 < sum(mirrored) < 30
    dataset.recipe = replace(dataset.recipe, flip=False)
    items = [dataset[Drawn(step, 0, 0)].float() for step in range(20)]
    assert all(item[:, 0].mean() < item[:, -1].mean() for item in items)


def test_a_crop_at_full_size_is_not_resampled(shared, run):
    dataset = crops(shared, run, crop_scale=(0.5, 0.5))  # 20 pixels, and hence the resolution
    with Image.open(run.data / "3.png") as image:
        whole = np.asarray(image.convert("RGB"))
    item = dataset[Drawn(0, 0, 3)].numpy()
    places = [(y, x) for y in range(SIZE - 31) for x in range(SIZE - 31)]
    candidates = [whole[y : y + 32, x : x + 32] for y, x in places]
    assert any(np.array_equal(item, each) or np.array_equal(item, each[:, ::-1]) for each in candidates)


def test_large_jpeg_files_are_decoded_small(shared, run):
    image = Image.effect_noise((640, 480), 60).convert("RGB").resize((1280, 960))
    image.save(run.data / "0.jpg", quality=95)
    (run.data / "0.png").unlink()
    item = crops(shared, run, crop_scale=(1.0, 1.0), flip=False)[Drawn(0, 0, 0)].float()
    image.save(run.data / "0.png")
    (run.data / "0.jpg").unlink()
    exact = crops(shared, run, crop_scale=(1.0, 1.0), flip=False)[Drawn(0, 0, 0)].float()
    assert (item - exact).abs().mean() < 3


@pytest.mark.parametrize("small", ["skip", "enlarge"])
def test_pictures_smaller_than_the_crop(shared, run, capsys, small):
    Image.new("RGB", (100, 31)).save(run.data / "wide.png")
    (run.data / "broken.png").write_bytes(b"no picture")
    task = AutoencoderTask(recipe(shared, "full", small=small), run, CPU)
    err = capsys.readouterr().err
    assert len(task.pictures.items) == PICTURES + (small == "enlarge") and "skipped: broken.png: not a picture" in err
    assert ("skipped: wide.png: its shorter side has 31 pixels; expected 32 or more" in err) == (small == "skip")
    if small == "enlarge":
        number = [picture.name for picture in task.pictures.items].index("wide.png")
        dataset = RandomCrops(task.pictures, task.recipe, MAX_PIXELS)
        assert all(dataset[Drawn(step, 0, number)].shape == (32, 32, 3) for step in range(10))


def test_a_picture_that_is_cut_short(shared, run, capsys):
    """It has a size but cannot be decoded: the next picture takes its place."""
    os.truncate(run.data / "0.png", (run.data / "0.png").stat().st_size - 500)
    dataset = crops(shared, run)
    item = dataset[Drawn(5, 1, 0)]
    assert torch.equal(item, dataset[Drawn(5, 1, 1)])
    assert capsys.readouterr().err.count(f"failed: {run.data / '0.png'}: ") == 1
    for path in run.data.iterdir():
        os.truncate(path, path.stat().st_size - 500)
    with pytest.raises(DataError, match=f"none of the {PICTURES} pictures can be read"):
        crops(shared, run)[Drawn(0, 0, 0)]


@pytest.mark.parametrize("found", ["nothing", "only small ones", "no folder"])
def test_no_pictures(shared, run, found):
    if found != "only small ones":
        shutil.rmtree(run.data)
    if found == "nothing":
        run.data.mkdir()
    resolution = 64 if found == "only small ones" else 32
    words = {"nothing": "found no usable pictures", "no folder": "expected a folder"}
    with pytest.raises(DataError, match=words.get(found, "found no picture to train on; see --small")):
        AutoencoderTask(recipe(shared, "full", resolution=resolution), run, CPU)


def test_one_picture(shared, run, capsys):
    for path in sorted(run.data.iterdir())[1:]:
        path.unlink()
    AutoencoderTask(recipe(shared, "full"), run, CPU)
    assert "1 picture for a batch of 4; a batch repeats pictures" in capsys.readouterr().out


def test_shards(shared, run):
    with tarfile.open(run.data.parent / "a.tar", "w") as tar:
        for path in sorted(run.data.iterdir()):
            content = path.read_bytes()
            info = tarfile.TarInfo(path.name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    in_folder, in_shard = crops(shared, run), crops(shared, replace(run, data=run.data.parent / "a.tar"))
    assert torch.equal(in_folder[Drawn(1, 2, 3)], in_shard[Drawn(1, 2, 3)])
