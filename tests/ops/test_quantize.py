"""Rounding to int8."""

import pytest
import torch

from dcae_fast import ops
from dcae_fast.ops.quantize import quantize_op, quantize_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the kernel runs in the interpreter
SHAPES = [(2, 3, 5, 7), (1, 1153, 3, 1), (3, 64, 9, 40), (0, 16, 2, 2), (2, 0, 1, 1)]


def factors(channels):
    return 2 ** torch.linspace(-1, 1, channels, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, dtype):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 60).to(DEVICE, dtype)
    got = ops.quantize(x, factors(shape[1]))
    assert got.dtype == torch.int8 and torch.equal(got, quantize_reference(x, factors(shape[1])))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_half_to_even_and_clamped():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -300, float("inf"), -float("inf")], device=DEVICE)
    want = [0, 2, 2, 0, -2, -2, 126, 127, -127, 127, -127]
    scales = torch.tensor([1.0, 2.0**-20, 2.0**20], device=DEVICE)
    images = (x * scales[:, None])[None, :, None]
    for quantize in (ops.quantize, quantize_reference):
        assert quantize(images, 1 / scales).squeeze().tolist() == [want] * 3


def test_registration():
    x = torch.randn(2, 3, 5, 7, device=DEVICE)
    torch.library.opcheck(quantize_op.overload, (x, factors(3)))
    compiled = torch.compile(ops.quantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, factors(3)), ops.quantize(x, factors(3)))


def test_refusals():
    x = torch.ones(1, 3, 2, 2, device=DEVICE)
    for wrong in (factors(4), factors(3).double(), factors(3).view(3, 1)):
        with pytest.raises(ValueError, match=r"factor is \[.*expected \[3\] torch.float32"):
            ops.quantize(x, wrong)
    with pytest.raises(ValueError, match=r"x is \[3, 2, 2\]; expected \[B, C, H, W\]"):
        ops.quantize(x[0], factors(3))
    with pytest.raises(RuntimeError, match="no gradients"):
        ops.quantize(x.requires_grad_(), factors(3))


@pytest.mark.parametrize("shape", [(6, 16, 3, 3), (5, 8)])
def test_weights_have_a_scale_for_each_filter(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight *= 10.0 ** torch.arange(-3, shape[0] - 3, device=DEVICE).view(-1, *[1] * (len(shape) - 1))
    weight[1] = 0
    q, scale = ops.quantize_weight(weight.requires_grad_())
    assert q.dtype == torch.int8 and q.shape == shape and scale.shape == shape[:1] and scale[1] == 1
    used = [k for k in range(shape[0]) if k != 1]
    assert (q.flatten(1).abs().amax(1)[used] == 127).all() and (q[1] == 0).all()
    windows = (q - weight / scale.view(-1, *[1] * (len(shape) - 1))).reshape(*shape[:2], -1)
    assert (windows.abs() < (1 if len(shape) == 4 else 0.5001)).all() and (windows.sum(2).abs() <= 0.5001).all()
    if len(shape) == 4:
        assert q.is_contiguous(memory_format=torch.channels_last)


def test_sums_of_windows_are_rounded():
    """Few weights are rounded in the other direction, and those that lose least by it."""
    weight = torch.tensor([[127, 0.4, 0.45, 0.3], [-127, -0.4, -0.45, -0.3], [127, 0.6, 0.1, 0.2]], device=DEVICE)
    q, _ = ops.quantize_weight(weight.view(3, 1, 2, 2))
    assert q.flatten(1).tolist() == [[127, 0, 1, 0], [-127, 0, -1, 0], [127, 1, 0, 0]]


def test_weights_without_filters():
    q, scale = ops.quantize_weight(torch.empty(0, 16, 3, 3, device=DEVICE))
    assert q.shape == (0, 16, 3, 3) and scale.shape == (0,)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.zeros(1, 2**17 + 1, 2**7, 2**7, dtype=torch.bfloat16, device=DEVICE).permute(0, 3, 1, 2)
    x[0, -5:, -1, -1] = torch.arange(-2, 3, device=DEVICE)
    got = ops.quantize(x, torch.full((2**7,), 2.0, device=DEVICE))
    assert got[0, -6:, -1, -1].tolist() == [0, -4, -2, 0, 2, 4]
