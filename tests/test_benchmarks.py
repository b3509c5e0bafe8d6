"""A rehearsal of the benchmarks on small shapes."""

import json

import pytest
import torch

from benchmarks import autoencoder, operators, report
from benchmarks.ceilings import Ceilings, measure_ceilings
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig

CPU = torch.device("cpu")
CEILINGS = Ceilings(tflops=1.0, copy=1.0)


@pytest.fixture
def rows(monkeypatch):
    coder = CoderConfig((32, 32), (1, 1), ("ResBlock", "EViTGLU"), ("rms", "rms"), ("silu", "silu"))
    config = DCAEConfig(latent_channels=16, encoder=coder, decoder=coder)
    monkeypatch.setattr(DCAE, "from_name", classmethod(lambda cls, name: cls(config)))
    return list(
        autoencoder.benchmark("small", [1], 8, torch.float32, CPU, CEILINGS, with_diffusers=False, compiled=False)
    )


def test_every_contender_is_checked_and_timed(rows):
    assert {row["contender"] for row in rows} == {"eager", "eager channels-last", "patched", "patched channels-last"}
    assert {row["workload"] for row in rows} == {"small encode", "small decode"}
    for row in rows:
        assert 0 <= row["error"] < 1e-4 and row["ms"] > 0 and row["floor_ms"] > 0


def test_a_wrong_contender_is_reported_and_not_timed(rows, monkeypatch):
    monkeypatch.setattr(autoencoder, "relative_error", lambda got, expected: 1.0)
    wrong = list(
        autoencoder.benchmark("small", [1], 8, torch.float32, CPU, CEILINGS, with_diffusers=False, compiled=False)
    )
    assert all("ms" not in row for row in wrong)


def test_ceilings_and_floor():
    ceilings = measure_ceilings(CPU)
    assert ceilings.tflops > 0 and ceilings.copy > 0
    assert Ceilings(tflops=2.0, copy=1.0).floor(flops=4e12, bytes_moved=1e12) == pytest.approx(2000)
    assert Ceilings(tflops=2.0, copy=1.0).floor(flops=4e12, bytes_moved=3e12) == pytest.approx(3000)


def test_tables_and_readme(rows, tmp_path, monkeypatch):
    shapes = [("rms_norm", (1, 32, 4, 4)), ("relu_linear_attention", (1, 96, 4, 4)), ("depthwise_glu", (1, 32, 4, 4))]
    monkeypatch.setattr(operators, "SHAPES", shapes)
    results = report.stamp() | {"ceilings": vars(CEILINGS), "autoencoder": rows}
    results["operators"] = list(operators.benchmark(CPU, CEILINGS))
    report.write(results, tmp_path / "results" / "cpu.json")
    results = json.loads((tmp_path / "results" / "cpu.json").read_text())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "README", readme)
    report.write_readme(report.summary(results))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| small encode | 1, 8 |" in text and "| rms_norm | 1×32×4×4 |" in text
