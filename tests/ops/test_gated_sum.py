"""`gated_sum` against plain PyTorch: results and gradients in all types, odd and empty sizes, registration."""

import pytest
import torch
from accuracy import CEILING, allowed, relative_error
from registration import check_registration
from torch.testing import assert_close

from dcae_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "wide": (2, 9, 1152),
    "odd": (3, 17, 131),
    "one": (1, 1, 1),
    "no_images": (0, 4, 16),
    "no_tokens": (2, 0, 16),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def plain(x, gate, branch):
    return x + gate[:, None] * branch


def make(shape, *dtypes):
    """x, gate and branch."""
    generator = torch.Generator().manual_seed(0)
    shapes = shape, (shape[0], shape[2]), shape
    return [
        torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_()
        for size, dtype in zip(shapes, dtypes, strict=True)
    ]


def run(function, tensors):
    out = function(*tensors)
    dout = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, dout)]


@every_shape
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16,) * 3,
                                    (torch.float32, torch.float32, torch.bfloat16)], ids=str)  # fmt: skip
def test_matches_the_formula_in_float64(shape, dtypes):
    tensors = make(shape, *dtypes)
    exact = run(plain, [tensor.detach().double().requires_grad_() for tensor in tensors])
    for got, eager, want in zip(run(ops.gated_sum, tensors), run(plain, tensors), exact, strict=True):
        assert got.dtype == eager.dtype and got.shape == eager.shape
        rounding = torch.bfloat16 if torch.bfloat16 in dtypes else got.dtype
        assert relative_error(got, want) <= allowed(relative_error(eager, want), rounding)
    assert all(dtype in CEILING for dtype in dtypes)


def test_one_gradient_alone():
    tensors = make(SHAPES["odd"], *[torch.float32] * 3)
    whole = run(plain, tensors)
    for place in range(3):
        chosen = [t.detach().requires_grad_(at == place) for at, t in enumerate(tensors)]
        out = ops.gated_sum(*chosen)
        dout = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        assert_close(torch.autograd.grad(out, chosen[place], dout)[0], whole[1 + place])


def test_gradients_of_gradients():
    tensors = [t.detach().double().requires_grad_() for t in make((2, 3, 5), *[torch.float32] * 3)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        check(ops.gated_sum, tensors, fast_mode=True)


@every_shape
def test_registration(shape):
    check_registration(lambda: run(ops.gated_sum, make(shape, torch.float32, torch.float32, torch.bfloat16)))


def test_compiles_whole():
    tensors = make(SHAPES["odd"], *[torch.float32] * 3)
    torch._dynamo.reset()
    compiled = torch.compile(ops.gated_sum, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, tensors), run(ops.gated_sum, tensors), atol=0, rtol=0)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3), (2, 3)), ((2, 3, 4), (2, 3), (2, 3, 4)),
                                    ((2, 3, 4), (2, 4), (2, 3, 5))], ids=str)  # fmt: skip
def test_bad_input_is_refused(shapes):
    with pytest.raises(ValueError, match="expected"):
        ops.gated_sum(*map(torch.zeros, shapes))
