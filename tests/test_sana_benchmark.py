"""A rehearsal of the benchmarks of diffusers' SANA on small shapes."""

import math

import pytest
import torch

from benchmarks import profile, sana, tables
from benchmarks.ceilings import Ceilings
from benchmarks.sana_workloads import SANA_REHEARSAL, SANA_WORKLOADS, SanaWorkload

pytest.importorskip("diffusers")
CPU, CEILINGS = torch.device("cpu"), Ceilings(tflops=1.0, copy=1.0)


@pytest.mark.parametrize("workload", SANA_REHEARSAL, ids=lambda workload: workload.work)
def test_contenders_are_checked_and_timed(monkeypatch, workload):
    if workload.work == "pipeline":  # in Triton's interpreter, the patched decoder would take minutes
        monkeypatch.setitem(sana.PREPARE, "patched", lambda model: None)
    record = sana.benchmark(workload, CPU, CEILINGS)
    assert tuple(record["contenders"]) == workload.contenders
    for row in record["contenders"].values():
        assert "failure" not in row and 0 < row["error"] < 5e-2 and 0 < row["mfu"] < 1
    assert record["workload"] in tables.network_table([record])
    if workload.work == "training":
        assert record["drift"] > 0 and record["contenders"]["patched"]["loss_error"] < 1e-2


def test_contenders_of_its_own(monkeypatch):
    """Names that no other benchmark has."""
    monkeypatch.setattr(sana, "PREPARE", dict.fromkeys(sana.PREPARE, lambda model: None))
    workload = SanaWorkload("tiny", "forward", 1, 64, tuple(sana.PREPARE))
    rows = sana.benchmark(workload, CPU, CEILINGS)["contenders"]
    assert all("ms" in rows[name] for name in sana.PREPARE)


def test_a_wrong_contender_is_not_timed(monkeypatch):
    def spoil(model):
        model.register_forward_hook(lambda module, args, out: 1.2 * out)

    for work, contender in (("forward", "patched"), ("training", "patched")):
        monkeypatch.setitem(sana.PREPARE, contender, spoil)
        row = sana.benchmark(SanaWorkload("tiny", work, 1, 64, ("eager", contender)), CPU, CEILINGS)["contenders"]
        assert row[contender]["failure"] == "wrong" and "ms" not in row[contender]


def test_workloads_can_be_built():
    assert len({workload.name for workload in SANA_WORKLOADS}) == len(SANA_WORKLOADS)
    assert all(set(workload.contenders) <= sana.PREPARE.keys() for workload in SANA_WORKLOADS)


def test_flops():
    """Products by hand: 2 · weights of layers per token, for 1024 tokens and for 300 of the text; attention.

    The depthwise convolutions have 9 weights for each channel; the linear attention multiplies heads of 33 × 32 twice.
    """
    width, hidden, tokens, text, blocks = 2240, 5600, 1024, 300, 20
    image = blocks * (6 * width**2 + 2 * hidden * width + hidden * width + 9 * 2 * hidden) + 2 * 32 * width
    linear_attention = blocks * tokens * 2 * 33 * width
    words = blocks * 2 * width**2 + 2304 * width + width**2
    softmax_attention = blocks * 2 * tokens * text * width
    time = 256 * width + width**2 + 6 * width**2
    total = tokens * image + linear_attention + text * words + softmax_attention + time
    workload = SanaWorkload("1600m", "forward", 2, 1024, ())
    assert math.isclose(sum(sana.flops_by_operator(workload).values()), 4 * total, rel_tol=1e-3)


@pytest.mark.parametrize("work", ["forward", "training"])
def test_profile_accounts_for_the_call(work):
    record = profile.profile(SanaWorkload("tiny", work, 1, 64, ()), "eager", CPU, CEILINGS)
    assert record["kinds"]["convolution"]["ms"] > 0 and record["kinds"]["convolution"]["floor_ms"] > 0
    assert "| matrix product |" in tables.profile_table(record)
