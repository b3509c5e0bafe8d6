"""The distance of LPIPS against its formula in float64. Its result is a float32 scalar for every type of features."""

import pytest
import torch
from accuracy import CEILING, allowed, relative_error
from registration import check_registration

from dcae_fast import ops
from dcae_fast.models import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the Triton kernels run in the interpreter
SIZES = [(2, 64, 5, 7), (3, 40, 7, 9), (1, 513, 1, 1), (1, 3, 2, 3)]


def make(size, dtype, requires_grad=(True, True, True)):
    generator = torch.Generator().manual_seed(0)
    shapes = size, size, size[1:2]
    tensors = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return [tensor.requires_grad_(wanted) for tensor, wanted in zip(tensors, requires_grad, strict=True)]


def run(op, tensors):
    distance = op(*tensors)
    return [distance, *torch.autograd.grad(3 * distance, [tensor for tensor in tensors if tensor.requires_grad])]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", CEILING, ids=str)
def test_matches_the_formula_in_float64(size, dtype):
    tensors = make(size, dtype)
    exact = run(functional.feature_distance, [tensor.detach().double().requires_grad_() for tensor in tensors])
    eager = run(functional.feature_distance, tensors)
    got = run(ops.feature_distance, tensors)
    assert got[0].dtype == torch.float32 and got[0].shape == ()
    for value, want, plain in zip(got, exact, eager, strict=True):
        assert relative_error(value, want) <= allowed(relative_error(plain, want), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_the_layout_does_not_matter(layout):
    tensors = make((2, 40, 3, 5), torch.float32)
    strided = [tensor.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for tensor in tensors]
    nhwc = [tensor.detach().contiguous(memory_format=torch.channels_last) for tensor in tensors[:2]]
    expected = run(ops.feature_distance, [*(each.requires_grad_() for each in nhwc), tensors[2]])
    got = run(ops.feature_distance, tensors if layout == "contiguous" else strided)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value, want)


def test_zero_features_have_a_finite_gradient():
    a, b, head = make((1, 16, 2, 2), torch.float32, (True, False, False))
    with torch.no_grad():
        a.zero_()
    assert run(ops.feature_distance, [a, b, head])[1].isfinite().all()


def test_equal_features_have_no_distance():
    a, _, head = make((1, 16, 2, 2), torch.bfloat16)
    assert ops.feature_distance(a, a, head).abs() < 1e-12  # rounded, where products and sums are fused


def test_gradients_of_the_reference():
    tensors = [tensor.detach().double().requires_grad_() for tensor in make((1, 5, 2, 3), torch.float32)]
    assert torch.autograd.gradcheck(ops.feature_distance, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(ops.feature_distance, tensors, fast_mode=True)


def test_registration():
    check_registration(lambda: run(ops.feature_distance, make((1, 8, 2, 3), torch.float32)))


def test_compiles_whole():
    tensors = make((1, 8, 2, 3), torch.bfloat16, (True, False, False))
    expected = run(ops.feature_distance, tensors)
    compiled = torch.compile(lambda *args: ops.feature_distance(*args), fullgraph=True, backend="aot_eager")
    for value, want in zip(run(compiled, tensors), expected, strict=True):
        torch.testing.assert_close(value, want)


def test_other_shapes_are_named():
    a, b, head = make((1, 8, 2, 3), torch.float32)
    for wrong in ((a, b[:, :4], head), (a, b, head[:4]), (a[0], b[0], head)):
        with pytest.raises(ValueError, match=r"expected \[B, C, H, W\], the same, \[C\]"):
            ops.feature_distance(*wrong)
