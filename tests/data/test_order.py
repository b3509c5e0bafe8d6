"""The order of the data, against the original's and as a training run needs it."""

import json

import pytest

from dcae_fast.data.sampler import EpochSampler


def test_order_as_the_original(reference):
    cases = json.loads((reference / "fixtures" / "pipeline.json").read_text())["sampler"]
    for case in cases:
        options = {name: case[name] for name in ("seed", "shuffle", "drop_last")}
        for rank, expected in enumerate(case["indices_by_rank"]):
            sampler = EpochSampler(case["samples"], rank, case["replicas"], **options)
            assert len(sampler) == len(expected) + case["iter_index"]
            sampler.epoch, sampler.seen = case["epoch"], case["iter_index"]
            assert list(sampler) == expected, case


def test_resume_continues_the_order():
    batch, whole = 3, EpochSampler(23, 1, 2, seed=5)
    batches = [epoch[i : i + batch] for epoch in (list(whole), list(whole), list(whole)) for i in range(0, 9, batch)]
    for step in range(len(batches)):
        resumed = EpochSampler(23, 1, 2, seed=5)
        resumed.resume(step, batch)
        rest = list(resumed)
        got = [rest[i : i + batch] for i in range(0, len(rest) - len(rest) % batch, batch)]
        assert got == batches[step : step + 3 - step % 3]


def test_bad_arguments():
    with pytest.raises(ValueError, match="rank=2, ranks=2"):
        EpochSampler(5, 2, 2)
    with pytest.raises(ValueError, match="batch=6; expected at most 5"):
        EpochSampler(5).resume(0, 6)
