"""The formulas of the metrics give the original's values. No network is needed."""

import os
import zipfile
from functools import partial

import numpy as np
import pytest
import torch

from dcae_fast import images
from dcae_fast.errors import DataError
from dcae_fast.evaluation import metrics
from dcae_fast.evaluation.labels import class_labels
from dcae_fast.evaluation.moments import Moments, MomentSums
from dcae_fast.evaluation.pictures import NpzBatches
from dcae_fast.evaluation.references import load_features


@pytest.fixture
def pipeline(open_case):
    return open_case("pipeline", "")


def moments(features: torch.Tensor, *sizes: int) -> Moments:
    sums = MomentSums()
    for part in features.split(sizes) if sizes else [features]:
        sums.add(part)
    return sums.moments()


def test_quantisation(pipeline):
    tensors = pipeline.tensors("quantise")
    for name in ("autoencoder_uint8", "generation_uint8"):
        assert torch.equal(images.to_uint8(tensors["decoded"]), tensors[name])


def test_psnr(pipeline):
    tensors = pipeline.tensors("psnr")
    each = images.psnr(tensors["prediction"], tensors["reference"])
    torch.testing.assert_close(each.float(), tensors["each"], rtol=1e-6, atol=0)
    assert each.mean().item() == pytest.approx(pipeline.file_meta["psnr"]["mean_over_images"], rel=1e-6)


def test_moments(pipeline):
    tensors = pipeline.tensors("frechet")
    for number, sizes in ((1, (30, 1, 59)), (2, ())):
        got = moments(tensors[f"features_{number}"], *sizes)
        whole = Moments.of(tensors[f"features_{number}"])
        np.testing.assert_allclose(got.sigma, whole.sigma, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(got.mu, whole.mu, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(got.mu, tensors[f"mu_{number}"].numpy(), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(got.sigma, tensors[f"sigma_{number}"].numpy(), rtol=1e-5, atol=1e-6)


def test_frechet_distance(pipeline):
    tensors, expected = pipeline.tensors("frechet"), pipeline.file_meta["frechet"]
    one, other = (Moments(tensors[f"mu_{k}"].numpy(), tensors[f"sigma_{k}"].numpy()) for k in (1, 2))
    assert metrics.frechet_distance(one, other) == pytest.approx(expected["distance"], rel=1e-9)
    singular = moments(tensors["features_singular"])
    assert metrics.frechet_distance(singular, other) == pytest.approx(expected["distance_singular"], rel=1e-6)
    assert metrics.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall(pipeline, monkeypatch):
    tensors, expected = pipeline.tensors("precision_recall"), pipeline.file_meta["precision_recall"]
    for rows in (7, 4096):
        monkeypatch.setattr(metrics, "ROWS", rows)
        got = metrics.precision_recall(tensors["samples"], tensors["reference"], expected["neighbours"])
        assert got == pytest.approx((expected["precision"], expected["recall"]), abs=1e-7)
    with pytest.raises(ValueError, match="3 samples and 120 reference pictures"):
        metrics.precision_recall(tensors["samples"][:3], tensors["reference"])


def test_inception_score(pipeline):
    expected = pipeline.file_meta["inception_score"]
    got = metrics.inception_score(pipeline.tensors("inception_score")["logits"])
    assert got == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-6)
    with pytest.raises(ValueError, match="9 samples"):
        metrics.inception_score(torch.zeros(9, 4))


def test_maximum_mean_discrepancy(pipeline, monkeypatch):
    """The original computes in float32, which gives about four correct digits."""
    tensors, expected = pipeline.tensors("cmmd"), pipeline.file_meta["cmmd"]
    one, other = tensors["embeddings_1"], tensors["embeddings_2"]
    got = metrics.maximum_mean_discrepancy(one, other, expected["sigma"], expected["scale"])
    assert got == pytest.approx(expected["value"], abs=1000 * 4 * 2**-24)
    monkeypatch.setattr(metrics, "ROWS", 7)
    longer = torch.cat([other, one])
    assert metrics.maximum_mean_discrepancy(one, longer) == pytest.approx(got, abs=1e-9)


def test_class_labels(pipeline):
    labels, expected = class_labels(50000, 1000, 0), pipeline.file_meta["sample_class"]
    tensors = pipeline.tensors("sample_class")
    assert labels.sum().item() == expected["sum"]
    assert torch.equal(labels[:64].int(), tensors["seed0_first64"])
    assert torch.equal(labels.bincount(minlength=1000), tensors["seed0_histogram"])


def test_statistics_files(tmp_path):
    stats = moments(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)))
    stats.save(tmp_path / "new" / "stats.npz")
    with np.load(tmp_path / "new" / "stats.npz") as file:
        assert sorted(file.files) == ["mu", "sigma"] and file["mu"].dtype == file["sigma"].dtype == np.float64
    loaded = Moments.load(tmp_path / "new" / "stats.npz")
    assert np.array_equal(loaded.mu, stats.mu) and np.array_equal(loaded.sigma, stats.sigma)
    (tmp_path / "torn.npz").write_bytes(b"PK")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    for name in ("torn", "other", "shapes", "absent"):
        with pytest.raises(DataError, match=f"{name}.npz"):
            Moments.load(tmp_path / f"{name}.npz")


GARBLED = b"\x93NUMPY\x01\x00\x10\x00{'a':(((((((((\n      "  # numpy raises TokenError for this header


def test_damaged_files(tmp_path):
    def refused(read, file):
        with pytest.raises(DataError, match=f"{file}: expected an .np"):
            read(file)

    file = tmp_path / "a.npz"
    np.savez_compressed(file, mu=np.random.default_rng(0).random(500), sigma=np.eye(500))
    content = file.read_bytes()
    for damaged in (b"", content[:200] + b"\xff" * 200 + content[400:]):
        file.write_bytes(damaged)
        refused(Moments.load, file)
    np.savez(file, mu=np.zeros(3, complex), sigma=np.eye(3))
    refused(Moments.load, file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", GARBLED)
    refused(partial(NpzBatches, batch=1), file)
    for content in (b"", GARBLED):
        (tmp_path / "a.npy").write_bytes(content)
        refused(load_features, tmp_path / "a.npy")
    for name, read in {"pipe.npy": load_features, "pipe.npz": Moments.load}.items():
        os.mkfifo(tmp_path / name)
        refused(read, tmp_path / name)
    refused(partial(NpzBatches, batch=1), tmp_path / "pipe.npz")


def test_too_few_pictures():
    with pytest.raises(DataError, match="0 pictures"):
        MomentSums().moments()
    for few in (moments, Moments.of):
        with pytest.raises(DataError, match="1 pictures"):
            few(torch.ones(1, 3))
    with pytest.raises(DataError, match="3 and 4 features"):
        metrics.frechet_distance(moments(torch.randn(9, 3)), moments(torch.randn(9, 4)))
