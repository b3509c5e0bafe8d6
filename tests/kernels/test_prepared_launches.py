"""Launches without Triton's search for the compiled kernel, and calls that repeat the launch of an earlier call."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from dcae_fast.kernels import launch
from dcae_fast.kernels.launch import Kernel, run_and_prepare
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

CONSTANTS = {"ACT": "silu", "BLOCK": 8, "num_warps": 4}


class Compiled:
    """A compiled kernel, which notes its launches. compiled[grid](...) is what Triton's users call."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, launches):
        self.launches = launches
        self.run = lambda *args: launches.append(args)

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, *args))


@pytest.fixture
def launches():
    return []


@pytest.fixture
def kernel(launches, monkeypatch):
    """A kernel that notes its launches. Triton compiles each version by its first launch."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: "stream"))
    )
    kernel = Kernel.__new__(Kernel)
    kernel._versions, kernel.jit = {}, {}

    class Jit:
        def __getitem__(self, grid):
            return lambda *args, **named: launches.append("compiled") or Compiled(launches)

    kernel.jit = Jit()
    return kernel


def test_a_launch_passes_addresses(kernel, launches):
    x, y = torch.zeros(8), torch.zeros(8)
    for tensor in (x, y):
        kernel[3, 2](tensor, None, 7, 0.5, **CONSTANTS)
    first, second = launches
    assert first == "compiled"
    assert second == (
        3,
        2,
        1,
        "stream",
        "function",
        "metadata",
        None,
        None,
        None,
        y.data_ptr(),
        None,
        7,
        0.5,
        "silu",
        8,
    )


@pytest.mark.parametrize(
    "args, constants",
    [
        ((torch.zeros(8).double(), None, 7, 0.5), CONSTANTS),
        ((torch.zeros(9)[1:], None, 7, 0.5), CONSTANTS),
        ((torch.zeros(8), torch.zeros(8), 7, 0.5), CONSTANTS),
        ((torch.zeros(8), None, 16, 0.5), CONSTANTS),
        ((torch.zeros(8), None, 7, 0.5), CONSTANTS | {"BLOCK": 16}),
        ((torch.zeros(8), None, 7, 0.5), CONSTANTS | {"num_warps": 8}),
    ],
)
def test_other_arguments_take_another_version(args, constants, kernel, launches):
    kernel[3,](torch.zeros(8), None, 7, 0.5, **CONSTANTS)
    kernel[3,](*args, **constants)
    assert launches == ["compiled", "compiled"]


def test_profilers_see_launches(kernel, launches, monkeypatch):
    x, hook = torch.zeros(8), knobs.HookChain()
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    for seen in (False, True):
        if seen:
            hook.add(lambda metadata: None)
        kernel[3,](x, BLOCK=8)
        kernel[3,](x, BLOCK=8)
    assert launches[2:] == [((3, 1, 1), x.data_ptr(), 8)] * 2


def test_a_prepared_launch_reads_other_tensors(kernel, launches):
    def launcher(x, factor, weight):
        y, total = torch.empty_like(x, dtype=torch.float64), x.new_empty(0)
        kernel[x.numel(),](y, weight, x, total, factor, BLOCK=8)
        return y, total

    x, weight = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.zeros(3)
    expected, run = run_and_prepare(launcher, (x, 0.5, weight))
    x, weight = torch.ones_like(x), torch.ones(3)
    y, total = run(x, 0.5, weight)
    for got, want in zip((y, total), expected, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert y.data_ptr() != expected[0].data_ptr()
    assert launches[-1][:3] == (120, 1, 1)
    assert launches[-1][9:] == (y.data_ptr(), weight.data_ptr(), x.data_ptr(), total.data_ptr(), 0.5, 8)


def read_twice(kernel, x, y):
    out = torch.empty_like(x)
    kernel[1,](x, out, BLOCK=8)
    kernel[1,](y, out, BLOCK=8)
    return out


def read_a_converted_tensor(kernel, x, y):
    out = torch.empty_like(x)
    kernel[1,](x.double(), y, out, BLOCK=8)
    return out


def write_to_another_tensor(kernel, x, y):
    partial = torch.empty_like(x)
    kernel[1,](x, y, partial, BLOCK=8)
    return partial.sum(0)


def return_what_was_not_written(kernel, x, y):
    out = torch.empty_like(x)
    kernel[1,](x, y, out, BLOCK=8)
    return out, torch.zeros(2)


def return_an_argument(kernel, x, y):
    kernel[1,](x, y, BLOCK=8)
    return x


def read_a_description(kernel, x, y):
    out = torch.empty_like(x)
    kernel[1,](TensorDescriptor(x, [8], [1], [8]), y, out, BLOCK=8)
    return out


def return_a_list(kernel, x, y):
    out = torch.empty_like(x)
    kernel[1,](x, y, out, BLOCK=8)
    return [out]


def return_no_second_result(kernel, x, y):
    out = torch.empty_like(x)
    kernel[1,](x, y, out, BLOCK=8)
    return out, None


def launch_nothing(kernel, x, y):
    return torch.empty_like(x)


@pytest.mark.parametrize(
    "launcher",
    [
        read_twice,
        read_a_converted_tensor,
        write_to_another_tensor,
        return_what_was_not_written,
        return_an_argument,
        read_a_description,
        return_a_list,
        return_no_second_result,
        launch_nothing,
    ],
)
def test_launchers_that_do_more(launcher, kernel):
    assert run_and_prepare(lambda *args: launcher(kernel, *args), (torch.zeros(8), torch.zeros(8)))[1] is None


def test_a_tensor_in_two_places(kernel):
    """A later call may pass two tensors there."""

    def launcher(x, residual):
        out = torch.empty_like(x)
        kernel[1,](x, residual, out, BLOCK=8)
        return out

    x = torch.zeros(8)
    assert run_and_prepare(launcher, (x, x))[1] is None
    assert run_and_prepare(launcher, (x, torch.zeros(8)))[1] is not None


def test_an_error_ends_the_recording(kernel):
    def launcher():
        raise ValueError

    with pytest.raises(ValueError):
        run_and_prepare(launcher, ())
    assert launch._recorded.launches is None
