"""`LatentDataset`: the folders of latents that training reads."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from dcae_fast.data.latents import LatentDataset, Shards
from dcae_fast.data.manifest import Manifest, Settings
from dcae_fast.data.pictures import Picture
from dcae_fast.data.store import ShardStore
from dcae_fast.errors import DataError


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
    """A class without readable pictures keeps its number."""
    settings = Settings("m", "float32", 64, 1.0, "npy", "", (4, 2, 2))
    Manifest(settings, ("a", "b", "c"), latents=1).save(tmp_path)
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "c" / "0.npy", latent(0))
    assert LatentDataset(tmp_path)[0][1] == 2
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "0.npy", latent(0))
    with pytest.raises(DataError, match="not in a class folder"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("listed", [None, 2])
def test_an_unfinished_cache(tmp_path, listed):
    Manifest(Settings("m", "float32", 64, 1.0, "npy", "", (4, 2, 2)), (), latents=listed).save(tmp_path)
    np.save(tmp_path / "0.npy", latent(0))
    with pytest.raises(
        DataError, match="contains 1 latents, but its manifest.json (lists 2|is not finished); .* cache-latents"
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


BAD = {
    "two sizes": (np.zeros((4, 2, 3), np.float32), r"latent of shape \[4, 2, 3\]; expected \[4, 2, 2\], as in "),
    "two dimensions": (np.zeros((4, 2), np.float32), r"float32 \[4, 2\]; expected floats \[c, h, w\]"),
    "integers": (np.zeros((4, 2, 2), np.int64), r"int64 \[4, 2, 2\]; expected floats"),
    "NaN": (np.full((4, 2, 2), np.nan, np.float32), "contains NaN or infinity"),
    "infinity": (np.full((4, 2, 2), np.inf, np.float16), "contains NaN or infinity"),
    "too large for float32": (np.full((4, 2, 2), 1e300), "contains NaN or infinity"),
    "objects": (np.full((4, 2, 2), None), "not a readable .npy file: contains pickled objects, not numbers"),
    "empty": (b"", "not a readable .npy file: "),
    "torn": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'", "not a readable .npy file: "),
    "a zip file": (b"PK\x03\x04", "not a readable .npy file: "),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("content, words", BAD.values(), ids=BAD)
def test_bad_files_are_named(tmp_path, content, words, with_manifest):
    if with_manifest:
        Manifest(Settings("m", "float32", 64, 1.0, "npy", "", (4, 2, 2)), ("a", "b"), latents=2).save(tmp_path)
    for folder in "ab":
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "a" / "0.npy", latent(0))
    if isinstance(content, bytes):
        (tmp_path / "b" / "1.npy").write_bytes(content)
    else:
        np.save(tmp_path / "b" / "1.npy", content)
    dataset = LatentDataset(tmp_path)
    assert torch.equal(dataset[0][0], torch.from_numpy(latent(0)))
    with pytest.raises(DataError, match=f"{tmp_path}/b/1.npy: {words}"):
        dataset[1]


def test_big_endian_and_fortran_order(tmp_path):
    np.save(tmp_path / "0.npy", np.asfortranarray(latent(0).astype(">f8")))
    assert torch.equal(LatentDataset(tmp_path)[0][0], torch.from_numpy(latent(0)))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"latents": torch.zeros(2, 4, 2, 3)}, r"latents are F32 \[2, 4, 2, 3\]; expected floats \[2, 4, 2, 2\]"),
        ({"latents": torch.zeros(3, 4, 2, 2)}, r"latents are F32 \[3, 4, 2, 2\]; expected floats \[2, 4, 2, 2\]"),
        ({"latents": torch.zeros(2, 4, 2, 2, dtype=torch.int32)}, "latents are I32"),
        ({"classes": torch.tensor([0, 2])}, "latent 1 has class 2; expected 0 to 1, as in manifest.json"),
        ({"classes": torch.tensor([-1, 0])}, "latent 0 has class -1"),
        ({"classes": torch.tensor(0)}, r"latents are F32 \[2, 4, 2, 2\]; expected floats \[1, 4, 2, 2\]"),
        ({"classes": None}, "not a readable shard of latents"),
        ({"names": "[]"}, "expected 2 different names in its metadata, one per latent"),
        ({"names": "[1, 2]"}, "expected 2 different names in its metadata, one per latent"),
        ({"names": '["a", "a"]'}, "expected 2 different names in its metadata, one per latent"),
        ({"names": "torn"}, "not a readable shard of latents"),
        ({"names": "[" * 10**5}, "not a readable shard of latents: maximum recursion depth"),
    ],
)
def test_bad_shards_are_named(tmp_path, change, words):
    Manifest(Settings("m", "float32", 64, 1.0, "safetensors", "", (4, 2, 2)), ("a", "b"), latents=2).save(tmp_path)
    tensors = {"latents": torch.zeros(2, 4, 2, 2), "classes": torch.tensor([0, 1]), "names": '["a/x", "b/y"]'} | change
    names = tensors.pop("names")
    path = tmp_path / "latents-000000.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"names": names})
    with pytest.raises(DataError, match=f"{path}: {words}"):
        LatentDataset(tmp_path)


def test_classes_of_a_shard_without_a_manifest(tmp_path):
    tensors = {"latents": torch.zeros(1, 4, 2, 2), "classes": torch.zeros(1)}
    save_file(tensors, tmp_path / "latents-000000.safetensors")
    with pytest.raises(DataError, match="latent 0 has class 0.0; expected a whole number$"):
        Shards([tmp_path / "latents-000000.safetensors"])


def test_a_latent_in_a_shard_that_is_not_finite(tmp_path):
    Manifest(Settings("m", "float32", 64, 1.0, "safetensors", "", (4, 2, 2)), ("a", "b"), latents=2).save(tmp_path)
    z = torch.zeros(2, 4, 2, 2, dtype=torch.bfloat16)
    z[1, 0, 0, 0] = float("inf")
    path = tmp_path / "latents-000000.safetensors"
    save_file({"latents": z, "classes": torch.tensor([0, 1])}, path, {"names": '["a/x", "b/y"]'})
    dataset = LatentDataset(tmp_path)
    assert dataset[0][1] == 0
    with pytest.raises(DataError, match=f"{path}/b/y: contains NaN or infinity"):
        dataset[1]


def test_a_latent_is_read_once_through_links(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a" / "0.npy", latent(0))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert len(LatentDataset(tmp_path)) == 1


def test_no_latents(tmp_path):
    with pytest.raises(DataError, match="expected a folder written by `dcae-fast cache-latents`, found no latents"):
        LatentDataset(tmp_path)
    save_file({"latents": torch.zeros(1, 4, 2, 2)}, tmp_path / "latents-000000.safetensors")
    with pytest.raises(
        DataError, match=r"`dcae-fast cache-latents`, found latents-\*.safetensors without manifest.json"
    ):
        LatentDataset(tmp_path)
