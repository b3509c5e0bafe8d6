"""Statistics against the original's, and what a manifest refuses."""

import json

import numpy as np
import pytest

from dcae_fast.data.manifest import MANIFEST, DataError, Manifest, Settings, Sums, load_manifest, statistics

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
    "text", ["", "[]", "{}", json.dumps({"settings": {"model": "m"}, "classes": [], "skipped": []})]
)
def test_something_else(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DataError, match="not a manifest"):
        load_manifest(tmp_path)
