"""The operators with pytest-benchmark: pytest benchmarks --benchmark-only. One round makes `operators.CALLS` calls."""

import pytest
import torch

from . import operator_cases, operators

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = list(dict.fromkeys(operators.shapes(DEVICE)))


@pytest.mark.parametrize("form", ["ours", "eager"])
@pytest.mark.parametrize("name, shape", CASES, ids=[f"{name} {'x'.join(map(str, shape))}" for name, shape in CASES])
def test_operator(benchmark, name, shape, form):
    case = operator_cases.case(name, shape, DEVICE)
    assert operators.error_of(case) <= operators.MAX_ERROR
    calls = operators.repeated(case.op if form == "ours" else case.reference, case.tensors)

    def run() -> None:
        calls()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {shape}"
    benchmark(run)
