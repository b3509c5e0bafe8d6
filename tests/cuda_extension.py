"""Shared code of the tests of dcae_fast._C."""

import importlib.util
from collections.abc import Callable

import pytest
import torch

NEEDED = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("dcae_fast._C") is None, reason="dcae_fast._C is not built"),
]
CEILINGS = {torch.bfloat16: 1e-2, torch.float16: 1e-3}


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def check_in_a_graph(call: Callable[[], torch.Tensor]) -> None:
    """A replay of a CUDA graph writes the whole result, with the same values."""
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    got.fill_(float("nan"))
    graph.replay()
    assert torch.equal(got, expected)
