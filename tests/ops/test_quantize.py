"""Rounding to int8."""

import pytest
import torch

from dcae_fast import ops
from dcae_fast.ops.quantize import quantize_op, quantize_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernel runs in the interpreter
SHAPES = [(2, 3, 5, 7), (4097,), (0, 16, 2, 2), (3, 5), ()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 60).to(DEVICE, dtype)
    got = ops.quantize(x, 0.7)
    assert got.dtype == torch.int8 and torch.equal(got, quantize_reference(x, 0.7))
    if x.dim() == 4:
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_half_to_even_and_clamped():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -300, float("inf"), -float("inf")], device=DEVICE)
    want = [0, 2, 2, 0, -2, -2, 126, 127, -127, 127, -127]
    for scale in (1.0, 2.0**-20, 2.0**20):
        assert ops.quantize(x * scale, scale).tolist() == want
        assert quantize_reference(x * scale, scale).tolist() == want


def test_registration():
    x = torch.randn(2, 3, 5, 7, device=DEVICE)
    torch.library.opcheck(quantize_op.overload, (x, 0.1))
    compiled = torch.compile(lambda x: ops.quantize(x, 0.1), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.quantize(x, 0.1))


def test_refusals():
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a positive finite number"):
            ops.quantize(torch.ones(3, device=DEVICE), scale)
    with pytest.raises(RuntimeError, match="no gradients"):
        ops.quantize(torch.ones(3, device=DEVICE, requires_grad=True), 1.0)


@pytest.mark.parametrize("shape", [(6, 16, 3, 3), (5, 8)])
def test_weights_have_a_scale_for_each_filter(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight *= 10.0 ** torch.arange(-3, shape[0] - 3, device=DEVICE).view(-1, *[1] * (len(shape) - 1))
    weight[1] = 0
    q, scale = ops.quantize_weight(weight.requires_grad_())
    assert q.dtype == torch.int8 and q.shape == shape and scale.shape == shape[:1] and scale[1] == 1
    used = [k for k in range(shape[0]) if k != 1]
    assert (q.flatten(1).abs().amax(1)[used] == 127).all() and (q[1] == 0).all()
    error = (q * scale.view(-1, *[1] * (len(shape) - 1)) - weight).abs().flatten(1).amax(1)
    assert (error <= 0.5001 * scale).all()
    if len(shape) == 4:
        assert q.is_contiguous(memory_format=torch.channels_last)


def test_weights_without_filters():
    q, scale = ops.quantize_weight(torch.empty(0, 16, 3, 3, device=DEVICE))
    assert q.shape == (0, 16, 3, 3) and scale.shape == (0,)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.zeros(2**31 + 7, dtype=torch.bfloat16, device=DEVICE)
    x[-5:] = torch.arange(-2, 3)
    assert ops.quantize(x, 0.5)[-6:].tolist() == [0, -4, -2, 0, 2, 4]
