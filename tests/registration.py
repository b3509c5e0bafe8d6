"""Checks that operators are registered correctly with torch.library; shared by the tests of operators."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Record(TorchDispatchMode):
    """Records the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dcae_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def check_registration(run: Callable[[], object]) -> None:
    """Checks schema, fake and autograd registration of every operator that `run` calls, with torch.library.opcheck."""
    with _Record() as record:
        run()
    assert record.calls

    def fresh(value):
        if isinstance(value, (list, tuple)):
            return [fresh(item) for item in value]
        return value.detach().clone().requires_grad_() if isinstance(value, torch.Tensor) else value

    for func, args in record.calls:
        differentiable = not func.name().endswith("_backward")
        tests = ("test_schema", "test_faketensor") + ("test_autograd_registration",) * differentiable
        torch.library.opcheck(func, fresh(args), test_utils=tests)
