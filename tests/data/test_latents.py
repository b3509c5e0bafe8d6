"""Folders of latents as a training run reads them."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dcae_fast.data.latents import LatentDataset
from dcae_fast.data.manifest import DataError, Manifest, Settings
from dcae_fast.data.pictures import Picture
from dcae_fast.data.store import ShardStore


def latent(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 2, 2)).astype(np.float32)


@pytest.mark.parametrize("names, labels", [(["b/0", "a/1", "b/x/2", "a/10"], [0, 0, 1, 1]), (["1", "0"], [0, 0])])
def test_folders_of_the_original(tmp_path, names, labels):
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / f"{name}.npy", latent(seed))
    dataset = LatentDataset(tmp_path)
    assert dataset.manifest is None and dataset.shape == (4, 2, 2)
    assert dataset.classes == (("a", "b") if "/" in names[0] else ())
    order = sorted(range(len(names)), key=lambda seed: f"{names[seed]}.npy")
    assert [label for _, label in dataset] == labels
    for seed, (z, _) in zip(order, dataset, strict=True):
        assert torch.equal(z, torch.from_numpy(latent(seed)))


def test_classes_of_the_manifest(tmp_path):
    """A class of which no picture could be read keeps its number."""
    settings = Settings("m", "float32", 64, 1.0, "npy", "", (4, 2, 2))
    Manifest(settings, ("a", "b", "c"), latents=1).save(tmp_path)
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "0.npy", latent(0))
    assert LatentDataset(tmp_path)[0][1] == 2
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "0.npy", latent(0))
    with pytest.raises(DataError, match="in none of the class folders"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("told", [None, 2])
def test_a_cache_without_an_end(tmp_path, told):
    Manifest(Settings("m", "float32", 64, 1.0, "npy", "", (4, 2, 2)), (), latents=told).save(tmp_path)
    np.save(tmp_path / "0.npy", latent(0))
    with pytest.raises(
        DataError, match="holds 1 latents, and its manifest.json (says 2|is not finished); .* cache-latents"
    ):
        LatentDataset(tmp_path)


def test_shards_in_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardStore, "unit", 4)
    settings = Settings("m", "bfloat16", 64, 1.0, "safetensors", "", (4, 2, 2))
    Manifest(settings, ("a", "b"), latents=10).save(tmp_path)
    store = ShardStore(tmp_path, [Picture(f"{i}.png", f"{i}", i % 2) for i in range(10)], settings)
    z = torch.stack([torch.from_numpy(latent(seed)) for seed in range(10)]).bfloat16()
    store.write(list(range(10)), z)
    store.close()
    dataset = pickle.loads(pickle.dumps(LatentDataset(tmp_path)))
    loader = DataLoader(dataset, 3, num_workers=2)
    got, labels = map(torch.cat, zip(*loader, strict=True))
    assert torch.equal(got, z.float()) and labels.tolist() == [0, 1] * 5
    with pytest.raises(IndexError):
        dataset[10]


def test_broken(tmp_path):
    with pytest.raises(DataError, match="no latents here"):
        LatentDataset(tmp_path)
    np.save(tmp_path / "0.npy", latent(0))
    np.save(tmp_path / "1.npy", np.zeros((4, 2), np.float32))
    (tmp_path / "2.npy").write_bytes(b"")
    dataset = LatentDataset(tmp_path)
    with pytest.raises(DataError, match=r"1.npy: float32 \[4, 2\]"):
        dataset[1]
    with pytest.raises(DataError, match="2.npy: not a readable"):
        dataset[2]
