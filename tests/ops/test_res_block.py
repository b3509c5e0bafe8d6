"""The residual block in training: float32 weights beside half precision, what it keeps, and its epilogues in cuDNN."""

import json

import pytest
import torch
import torch.nn.functional as F
from accuracy import allowed, relative_error

from dcae_fast import ops
from dcae_fast.ops import _convolution_plans, _plans
from dcae_fast.ops._elementwise import activate_backward
from dcae_fast.ops.conv2d_gradients import _launch, conv2d_act_backward_op, conv2d_act_backward_reference
from dcae_fast.ops.res_block import ResBlock, res_block_op

DEVICE, NHWC = "cuda" if torch.cuda.is_available() else "cpu", torch.channels_last
NORMS = [("silu", "rms"), ("relu", "batch"), ("relu", "none"), ("none", "rms")]


def random(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=NHWC) if len(shape) == 4 else x


def inputs(act, norm, dtype=torch.float32, b=2, c=16, m=24, h=5, w=7):
    """Inputs of the operator: float32 parameters beside x in this dtype."""
    x, w1, w2 = random(b, c, h, w).to(dtype), random(m, c, 3, 3) / 12, random(c, m, 3, 3) / 15
    return ResBlock(x, w1, random(m), act, w2, norm, None if norm == "none" else random(c), random(c, seed=1), 1e-5)


def tensors_of(given):
    return [value for value in given if isinstance(value, torch.Tensor)]


def step(given, formula):
    """y, and the gradients of all tensors that require one."""
    y = formula(*given)[0]
    dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in tensors_of(given) if t.requires_grad], dy)]


def with_gradients(given, *frozen, dtype=None):
    """Copies of the inputs that require gradients, except those named."""
    leaves = {}
    for name, value in given._asdict().items():
        if isinstance(value, torch.Tensor):
            value = value.detach().to(dtype or value.dtype)
            leaves[name] = value.requires_grad_(name not in frozen)
    return given._replace(**leaves)


@pytest.mark.parametrize("act, norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_float32_weights_are_float32(act, norm, dtype):
    """As in training under autocast: x has half precision."""
    given = inputs(act, norm, dtype)
    exact = step(with_gradients(given, dtype=torch.float64), res_block_op.reference)
    eager = step(with_gradients(given), res_block_op.reference)
    got = step(with_gradients(given), ops.res_block)
    assert [value.dtype for value in got] == [dtype, dtype] + [torch.float32] * (len(got) - 2)
    for value, want, plain in zip(got, exact, eager, strict=True):
        assert relative_error(value, want) <= allowed(relative_error(plain, want), dtype, by_kernel=False)
        assert value.dim() != 4 or value.is_contiguous(memory_format=NHWC)


WEIGHTS = "w1", "b1", "w2", "scale", "shift"


@pytest.mark.parametrize("act, norm", NORMS)
@pytest.mark.parametrize("frozen", [WEIGHTS, ("x",), ("w1", "b1"), ("x", "w1", "b1"), ("w2",), ("b1",)], ids=str)
def test_the_same_gradients_if_some_are_not_wanted(frozen, act, norm):
    given = inputs(act, norm)
    names = [name for name, value in given._asdict().items() if isinstance(value, torch.Tensor)]
    whole = dict(zip(["y", *names], step(with_gradients(given), ops.res_block), strict=True))
    kept = ["y", *(name for name in names if name not in frozen)]
    for name, value in zip(kept, step(with_gradients(given, *frozen), ops.res_block), strict=True):
        torch.testing.assert_close(value, whole[name], msg=name)


@pytest.mark.parametrize("act, norm", NORMS)
def test_a_frozen_block_keeps_at_most_two_images(act, norm):
    images = set()

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[2:] == (5, 7):
            images.add(tensor.data_ptr())
        return tensor

    for frozen in ((), WEIGHTS):
        images.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ops.res_block(*with_gradients(inputs(act, norm), *frozen))
        of_act, of_norm = 2 if act == "silu" and not frozen else 1, norm != "none"
        assert len(images) == of_act + of_norm + (not frozen)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act": "gelu"}, "gelu"),
        ({"norm": "layer"}, "layer"),
        ({"norm": "none"}, "scale"),
        ({"scale": None}, "scale"),
        ({"w1": torch.zeros(24, 16, 1, 1)}, "w1"),
        ({"w2": torch.zeros(24, 24, 3, 3)}, "w2"),
        ({"b1": torch.zeros(16)}, "b1"),
        ({"shift": torch.zeros(24)}, "shift"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ops.res_block(*inputs("silu", "rms")._replace(**change))


# The convolution with act' in its epilogue


def plan_in_torch(x, weight, stride, padding, epilogue, fallback, then):
    """A plan computed by PyTorch, in place of `find`'s; its operands come in the order of the epilogue."""

    def plan(x, weight, operands):
        y, bias, operands = F.conv2d(x, weight, None, stride, padding[:2]), 0.0, iter(operands)
        for name, _ in epilogue:
            operand = next(operands)
            if name == "operand_bias":
                bias = operand.view(1, -1, 1, 1)
            else:
                y = activate_backward(operand + bias, y, name.removesuffix("_backward"))
        assert next(operands, None) is None
        return y.contiguous(memory_format=NHWC)

    return plan


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("wants_bias", [True, False])
@pytest.mark.parametrize("act, biased", [("silu", True), ("silu", False), ("relu", False), ("none", False)])
def test_a_plan_and_its_fallback_compute_the_same(act, biased, wants_bias, found, monkeypatch):
    monkeypatch.setattr(_convolution_plans, "available", lambda: True)
    monkeypatch.setattr(_convolution_plans, "find", plan_in_torch if found else lambda *args: None)
    monkeypatch.setattr("dcae_fast.ops.conv2d_gradients._fits_plans", lambda *args: True)
    dy, z, weight = random(2, 12, 5, 6), random(2, 16, 5, 6), random(16, 12, 3, 3) / 10
    args = dy, weight, z, random(16) if biased else None, act, wants_bias
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for got, want in zip(_launch(*args), conv2d_act_backward_reference(*args), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_what_follows_a_plan_is_timed_with_it(monkeypatch):
    calls = []
    monkeypatch.setattr(_plans, "find", lambda *args: calls.append(args[5](lambda *args: 1)))
    x, weight = random(1, 8, 2, 2), random(8, 8, 3, 3)
    _convolution_plans.find(x, weight, 1, (1,) * 4, [], None, lambda y: y + 1)
    _convolution_plans.find(x, weight, 1, (1,) * 4, [], None)
    assert calls == [2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act, bias_dtype", [("silu", None), ("silu", torch.float32), ("relu", None), ("none", None)])
@torch.no_grad()
def test_every_candidate_is_right(act, bias_dtype, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("DCAE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_plans, "_plans", {})
    dy, z, flipped = (random(*s, dtype=dtype) for s in ((2, 96, 40, 48), (2, 64, 40, 48), (64, 96, 3, 3)))
    bias = None if bias_dtype is None else random(64, dtype=bias_dtype)
    args = dy, flipped / 30, z, bias, act, True
    exact = conv2d_act_backward_reference(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    eager = conv2d_act_backward_reference(*args)

    def check():
        for got, want, plain in zip(conv2d_act_backward_op(*args), exact, eager, strict=True):
            assert relative_error(got, want) <= allowed(relative_error(plain, want), dtype)

    check()
    if not _convolution_plans.available():
        pytest.skip("dcae_fast._C was not built with cuDNN")
    (file,) = tmp_path.iterdir()
    (name,) = json.loads(file.read_text())
    for candidate in range(_plans.NO_PLAN, 5):
        _plans._plans.clear()
        file.write_text(json.dumps({name: candidate}))
        check()


@pytest.mark.gpu
@pytest.mark.parametrize("act, norm", NORMS)
def test_a_step_within_a_capture(act, norm, monkeypatch, tmp_path):
    """A new shape takes no plan within a capture; a shape that was seen before takes its plan."""
    monkeypatch.setenv("DCAE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_plans, "_plans", {})
    given = with_gradients(inputs(act, norm, torch.bfloat16, c=64, m=64, h=48, w=48))
    eager = step(with_gradients(given), res_block_op.reference)
    exact = step(with_gradients(given, dtype=torch.float32), res_block_op.reference)

    def captured():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(given, ops.res_block)
        graph.replay()
        return results

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # loads kernels
        step(given, ops.res_block)
    torch.cuda.synchronize()
    _plans._plans.clear()
    for results in (captured(), step(given, ops.res_block), captured()):
        for got, rounded, want in zip(results, eager, exact, strict=True):
            assert relative_error(got, want.double()) < 1.2 * relative_error(rounded, want.double()) + 1e-3
