"""The choice of a kernel, which the first call with a signature makes for all later calls."""

import pytest
import torch
from image_cases import CASES
from test_ops import make

from dcae_fast.ops import _library, _private
from dcae_fast.ops._library import Kernels
from dcae_fast.ops.rms_norm import rms_norm_op


def shapes(args):
    """A stand-in for the CUDA extension's signature; a negative number has none."""
    if any(isinstance(arg, int) and arg < 0 for arg in args):
        return None
    return repr([arg.shape if isinstance(arg, torch.Tensor) else arg for arg in args]).encode()


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(_library, "signature", shapes)
    return []


def kernels(calls, accepts=True, prepare=None):
    def note(name, result):
        return lambda x, n: calls.append(name) or result(x, n)

    return Kernels(
        "scale",
        note("reference", lambda x, n: n * x),
        note("accepts", lambda x, n: accepts),
        note("launch", lambda x, n: n * x + 1),
        None,
        prepare,
    )


def test_the_first_call_decides(calls):
    of_kernel, x = kernels(calls), torch.ones(2)
    for _ in range(3):
        assert of_kernel(x, 3).tolist() == [4, 4]
    assert calls == ["accepts", "launch", "launch", "launch"]
    assert of_kernel(torch.ones(3), 3).tolist() == [4, 4, 4]
    assert calls[4:] == ["accepts", "launch"]


def test_the_reference_is_kept_too(calls):
    of_kernel = kernels(calls, accepts=False)
    for _ in range(2):
        assert of_kernel(torch.ones(2), 3).tolist() == [3, 3]
    assert calls == ["accepts", "reference", "reference"]


def test_arguments_without_a_signature(calls):
    of_kernel = kernels(calls)
    for _ in range(2):
        assert of_kernel(torch.ones(2), -1).tolist() == [0, 0]
    assert calls == ["accepts", "launch"] * 2
    assert not of_kernel._ready


def test_prepared_calls(calls):
    of_kernel = kernels(calls, prepare=lambda x, n: lambda x, n: calls.append("plan") or x - n)
    of_kernel(torch.ones(2), 3)
    assert of_kernel(torch.ones(2), 3).tolist() == [-2, -2]
    assert calls == ["accepts", "launch", "plan"]


def test_the_launcher_is_kept_if_there_is_nothing_to_prepare(calls):
    of_kernel = kernels(calls, prepare=lambda x, n: calls.append("prepare"))
    for _ in range(3):
        assert of_kernel(torch.ones(2), 3).tolist() == [4, 4]
    assert calls == ["accepts", "launch", "prepare", "launch", "launch"]


def test_a_failed_call_is_not_kept(calls):
    """Such as one that ran out of memory."""
    failures = [torch.OutOfMemoryError]

    def launch(x, n):
        if failures:
            raise failures.pop()
        return n * x

    of_kernel = Kernels("scale", None, lambda x, n: True, launch, None, None)
    with pytest.raises(torch.OutOfMemoryError):
        of_kernel(torch.ones(2), 3)
    assert not of_kernel._ready
    assert of_kernel(torch.ones(2), 3).tolist() == [3, 3]


def test_few_choices_are_kept(calls, monkeypatch):
    monkeypatch.setattr(_library, "MOST_SIGNATURES", 2)
    of_kernel = kernels(calls)
    for n in range(5):
        of_kernel(torch.ones(2), n)
        assert len(of_kernel._ready) <= 2
        assert of_kernel.known((torch.ones(2), n)) is not None


def test_nothing_is_known_in_forward_mode(calls, monkeypatch):
    of_kernel = kernels(calls)
    of_kernel(torch.ones(2), 3)
    assert of_kernel.known((torch.ones(2), 3)) is not None
    with torch.autograd.forward_ad.dual_level():
        assert _private.in_dual_level()
        assert of_kernel.known((torch.ones(2), 3)) is None


@torch.no_grad()
def test_profilers_see_calls_of_compiled_code(calls, monkeypatch):
    """While nothing is recorded, a known call takes no dispatcher."""
    monkeypatch.setattr(_library, "signature", lambda args: shapes(args) if type(args[0]) is torch.Tensor else None)
    overload, kernel = torch.ops.dcae_fast.rms_norm.default, rms_norm_op.kernel
    monkeypatch.setattr(kernel, "_ready", {})
    args = torch.ones(1, 4, 2, 2), torch.ones(4), torch.ones(4), 1e-5, "none", None, torch.float32
    monkeypatch.setitem(kernel._ready, shapes(args), lambda *args: calls.append("known") or args[0])
    compiled = torch.compile(lambda x: overload(x, *args[1:]), backend="aot_eager", fullgraph=True)
    for function in (lambda x: overload(x, *args[1:]), compiled):
        function(args[0])
        assert calls.pop() == "known"
        with torch.profiler.profile(record_shapes=True) as profile:
            function(args[0])
        events = [event for event in profile.events() if event.name == "dcae_fast::rms_norm"]
        assert [event.input_shapes[0] for event in events] == [[1, 4, 2, 2]]
        calls.clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_later_calls_compute_the_same_bits(name, dtype, monkeypatch):
    """Calls with kept choices and prepared launches; other tensors of the same shapes."""
    op, shapes = CASES[name]
    first, second = make(shapes, dtype), [2 * tensor for tensor in make(shapes, dtype)]
    op(*first)
    kept = [op(*second), op(*first), op(*second)]
    monkeypatch.setattr(_library, "signature", lambda args: None)
    expected = op(*second), op(*first), op(*second)
    assert all(map(torch.equal, kept, expected))
    for got, want in zip(kept, expected, strict=True):
        assert got.stride() == want.stride()
