"""Statistics equal the original's, and invalid manifests are refused."""

import json

import numpy as np
import pytest

from dcae_fast.data.manifest import MANIFEST, Manifest, Settings, Sums, load_manifest, statistics
from dcae_fast.errors import DataError

SETTINGS = Settings("m", "float32", 64, 0.5, "npy", "abc", (64, 2, 2))


def test_statistics_as_the_original(open_case):
    case = open_case("pipeline", "")
    latents = case.tensors("latent_stats")["latents"]
    got = statistics(Sums.of(latent.numpy()) for latent in latents)
    assert got == pytest.approx(case.file_meta["latent_stats"], rel=1e-6)


def test_statistics_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    sums = [Sums.of((10.0**power * rng.standard_normal((3, 4, 4))).astype(np.float32)) for power in range(-4, 5)]
    assert statistics(sums) == statistics(reversed(sums))
    assert statistics([]) == {}


def test_round_trip(tmp_path):
    manifest = Manifest(SETTINGS, ("cat", "dog"), 3, 2, ("dog/b.jpg",), 0.1, 1.0, 0.9)
    manifest.save(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert load_manifest(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 10**5, json.dumps({"settings": {"model": "m"}, "classes": [], "skipped": []})],
    ids=len,
)
def test_files_that_are_not_manifests(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="not a manifest"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "where, name, value",
    [
        ("settings", "shape", [64, 2]),
        ("settings", "shape", "64"),
        ("settings", "scaling_factor", 0),
        ("settings", "scaling_factor", float("nan")),
        ("settings", "resolution", "64"),
        ("settings", "format", "npz"),
        ("settings", "as_original", 1),
        ("settings", "model", None),
        (None, "classes", "cat"),
        (None, "classes", [1]),
        (None, "latents", -1),
        (None, "latents", True),
        (None, "mean", "0"),
        ("settings", "colour", "Lab"),
        (None, "tokens", 3),
    ],
)
def test_a_wrong_value_is_named(tmp_path, where, name, value):
    Manifest(SETTINGS, ("cat",), 1, 1, (), 0.1, 1.0, 0.9).save(tmp_path)
    content = json.loads((tmp_path / MANIFEST).read_text())
    (content[where] if where else content)[name] = value
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{MANIFEST}: not a manifest of cached latents: {name} is "):
        load_manifest(tmp_path)


def test_a_manifest_of_an_earlier_version(tmp_path):
    Manifest(SETTINGS, ("cat",)).save(tmp_path)
    content = json.loads((tmp_path / MANIFEST).read_text())
    del content["settings"]["as_original"], content["ignored"]
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    assert load_manifest(tmp_path).settings.as_original and load_manifest(tmp_path).ignored == ()
