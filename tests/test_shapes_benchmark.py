"""The benchmark of many shapes, rehearsed on a small model."""

import pytest
import torch

from benchmarks import contenders, shapes, tables, targets
from benchmarks.__main__ import CONTENDERS, records_of
from benchmarks.workloads import SHAPES_WORKLOADS, ShapesWorkload
from dcae_fast.models.autoencoder import DCAE, CoderConfig, DCAEConfig

CPU = torch.device("cpu")
WORKLOAD = ShapesWorkload("small", "decode", (4, 8), (4, 6))


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    coder = CoderConfig((32, 32), (1, 1), ("ResBlock", "ResBlock"), ("rms", "rms"), ("silu", "silu"))
    config = DCAEConfig(latent_channels=16, encoder=coder, decoder=coder)
    monkeypatch.setattr(DCAE, "from_name", classmethod(lambda cls, name: cls(config)))
    monkeypatch.setattr(shapes, "ROUNDS", 2)
    monkeypatch.setattr(shapes, "PASSES", 2)
    monkeypatch.setattr(shapes, "release", lambda: None)  # slow beside a small model
    contenders.random_model.cache_clear()
    yield
    contenders.random_model.cache_clear()


@pytest.fixture
def seen(monkeypatch):
    """Makes the patched contender unpatched, and returns the shapes of its inputs."""
    shapes_of_inputs = []

    def watch(half, workload):
        half.register_forward_pre_hook(lambda module, args: shapes_of_inputs.append(tuple(args[0].shape[2:])))

    monkeypatch.setitem(contenders.CONTENDERS, "patched, without graphs", contenders.Contender(watch))
    return shapes_of_inputs


def with_only(*names: str) -> ShapesWorkload:
    return ShapesWorkload("small", "decode", (4, 8), (4, 6), ("eager channels-last", *names))


def test_each_pass_takes_every_shape_once(seen):
    record = shapes.benchmark(with_only("patched, without graphs"), CPU)
    passes = 1 + shapes.ROUNDS * (shapes.PASSES + 1)  # the last of a round is for the error
    assert seen == passes * [(2, 2), (2, 3), (4, 2), (4, 3)]
    for row in record["contenders"].values():
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"] and row["again_ms"] > 0 and row["first_s"] > 0
        assert row["held_gib"] == 0 and 0 <= row["error"] < 1e-4 and "failure" not in row
    assert "| small-decode-4-shapes | patched, without graphs |" in tables.shapes_table([record])
    assert "ms again" in tables.line("shapes", record)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_contender_has_no_time(monkeypatch, factor):
    def spoil(half, workload):
        half.register_forward_hook(lambda module, args, out: out * factor if out.shape[-1] == 6 else out)

    monkeypatch.setitem(contenders.CONTENDERS, "rival", contenders.Contender(spoil))
    row = shapes.benchmark(with_only("rival"), CPU)["contenders"]["rival"]
    assert row["failure"] == "wrong" and "ms" not in row


def test_a_contender_that_fails_does_not_stop_the_others(monkeypatch):
    def fail(half, workload):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(contenders.CONTENDERS, "rival", contenders.Contender(fail))
    record = shapes.benchmark(with_only("rival"), CPU)
    assert (
        record["contenders"]["rival"] == {"failure": "out of memory"}
        and "ms" in record["contenders"]["eager channels-last"]
    )
    assert "out of memory" in tables.shapes_table([record])


def test_workloads_of_the_gpu():
    for workload in SHAPES_WORKLOADS:
        assert len(set(workload.sizes)) == 20 and workload.name.endswith("-20-shapes")
        assert all(side % 32 == 0 for size in workload.sizes for side in size)
        assert set(workload.contenders) <= set(CONTENDERS)


def test_the_part_runs_and_its_targets_are_judged(monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.shapes_workloads", lambda: [WORKLOAD])
    record = next(records_of("shapes", lambda name: True, {targets.WITHOUT}, CPU, None))
    assert set(record["contenders"]) == {"eager channels-last", targets.WITHOUT}
    rows = {targets.WITHOUT: {"ms": 100.0}, targets.PATCHED: {"ms": 103.0, "held_gib": 0.9}}
    results = {"shapes": [{"workload": SHAPES_WORKLOADS[0].name, "contenders": rows}]}
    found = {outcome.target.quantity: outcome for outcome in tables.outcomes(results) if outcome.value is not None}
    assert (found["ms"].verdict, found["held_gib"].verdict) == ("missed", "met")
    assert tables.sentence(found["held_gib"].target) == "memory held ≤ 1 GiB"
