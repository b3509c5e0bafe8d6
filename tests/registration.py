"""Checks that operators are registered correctly with torch.library; shared by the tests of operators."""

from collections.abc import Callable, Collection

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FLOAT8 = torch.float8_e4m3fn, torch.float8_e5m2


class _Record(TorchDispatchMode):
    """Records the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dcae_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def check_registration(run: Callable[[], object], without_gradient: Collection[str] = ()) -> None:
    """Checks schema, fake and autograd registration of every operator that `run` calls, with torch.library.opcheck.

    without_gradient: names of operators that have no gradient, besides those that end with _backward.
    """
    with _Record() as record:
        run()
    assert record.calls

    def fresh(value):
        if isinstance(value, (list, tuple)):
            return [fresh(item) for item in value]
        return value.detach().clone().requires_grad_() if isinstance(value, torch.Tensor) else value

    for func, args in record.calls:
        differentiable = not func.name().endswith("_backward") and func.name() not in without_gradient
        tests = ("test_faketensor",) + ("test_autograd_registration",) * differentiable
        if not any(
            isinstance(arg, torch.Tensor) and arg.dtype in FLOAT8 for arg in args
        ):  # opcheck cannot compare them
            tests += ("test_schema",)
        torch.library.opcheck(func, fresh(args), test_utils=tests)
