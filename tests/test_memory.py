"""Out-of-memory errors are recognised and replaced."""

import numpy as np
import pytest
import torch

from dcae_fast.memory import is_out_of_memory, out_of_memory_as


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**50)])
def test_on_the_cpu(allocate):
    with pytest.raises(ValueError, match="too large"), out_of_memory_as(ValueError("too large")):
        allocate()


@pytest.mark.gpu
def test_on_a_gpu():
    with pytest.raises(ValueError, match="too large"), out_of_memory_as(ValueError("too large")):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")


def test_other_errors():
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(ZeroDivisionError), out_of_memory_as(ValueError("too large")):
        raise ZeroDivisionError
