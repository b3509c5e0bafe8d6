"""A rehearsal of the benchmark of attention."""

import pytest
import torch

from benchmarks import attention, tables
from benchmarks.ceilings import Ceilings

CPU, CEILINGS = torch.device("cpu"), Ceilings(tflops=1.0, copy=1.0)


@pytest.mark.parametrize("workload", attention.REHEARSAL, ids=lambda workload: workload.name)
def test_contenders_are_checked_and_timed(workload):
    rows = attention.benchmark(workload, CPU, CEILINGS, attention.NAMES)["contenders"]
    assert list(rows) == [name for name in attention.NAMES if name in rows or "flash-attn" not in name]
    for name in ("eager", "SDPA flash"):
        assert rows[name]["ms"] > 0 and 0 < rows[name]["mfu"] < 1 and 0 < rows[name]["error"] < 1e-2
    assert all("failure" in row for name, row in rows.items() if name not in ("eager", "SDPA flash"))


@pytest.mark.parametrize("workload", attention.REHEARSAL, ids=lambda workload: workload.name)
def test_packed_sequences(workload):
    """An implementation that knows the lengths gives the same as one with a mask."""

    def varlen(q, k, v, ends_q, ends_k, most_q, most_k):
        assert most_q == workload.tokens and (ends_k.diff() == workload.lengths(CPU)).all()
        parts = zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True)
        return torch.cat(
            [attention.sdpa(None, None)(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in parts]
        )

    torch.manual_seed(0)
    shape, keys = (workload.batch, workload.tokens, 2, 16), workload.text or workload.tokens
    tensors = [torch.randn(size) for size in (shape, (2, keys, 2, 16), (2, keys, 2, 16), shape)]
    got = attention.call(attention.packed(varlen, workload, workload.lengths(CPU)), tensors, workload.gradient)
    torch.testing.assert_close(got, attention.exact_result(workload, tensors))


def test_a_wrong_implementation_is_not_timed(monkeypatch):
    made = attention.contenders(attention.REHEARSAL[0], CPU)
    wrong = made | {"flash-attn": lambda: lambda q, k, v: 1.2 * made["eager"]()(q, k, v)}
    monkeypatch.setattr(attention, "contenders", lambda *_: wrong)
    rows = attention.benchmark(attention.REHEARSAL[0], CPU, CEILINGS, ["flash-attn"])["contenders"]
    assert list(rows) == ["eager", "flash-attn"] and rows["flash-attn"]["failure"] == "wrong"


def test_the_table_has_a_column_for_each_implementation():
    records = [
        {"workload": "padded", "floor_ms": 0.01, "contenders": {"eager": {"ms": 0.25}, "flash-attn": {"ms": 0.125}}},
        {"workload": "long", "floor_ms": 1.0, "contenders": {"eager": {"ms": 2.0}, "SDPA cudnn": {"failure": "wrong"}}},
    ]
    assert tables.attention_table(records).splitlines()[2:] == [
        "| padded | 0.250 | 0.125 | – | 0.010 |",
        "| long | 2.000 | – | wrong | 1.000 |",
    ]
