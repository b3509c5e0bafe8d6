"""The order of the data equals the original's."""

import json

from dcae_fast.data.sampler import rank_indices


def test_order_as_the_original(reference):
    cases = json.loads((reference / "fixtures" / "pipeline.json").read_text())["sampler"]
    cases = [case for case in cases if case["shuffle"] and case["drop_last"]]
    assert len(cases) >= 3
    for case in cases:
        for rank, expected in enumerate(case["indices_by_rank"]):
            order = rank_indices(case["samples"], rank, case["replicas"], seed=case["seed"], epoch=case["epoch"])
            assert order.tolist()[case["iter_index"] :] == expected, case
