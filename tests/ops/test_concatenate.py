"""`concatenate` against torch.cat: results and gradients in all types, strides, odd and empty sizes, registration."""

import itertools

import pytest
import torch
from registration import check_registration
from torch.testing import assert_close

from dcae_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {
    "wide": (2, 9, 1152),
    "odd": (1, 17, 131),
    "one": (1, 1, 1),
    "no_images": (0, 4, 16),
    "no_tokens": (2, 0, 16),
    "no_channels": (2, 3, 0),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
near = {"atol": 0, "rtol": 0 if DEVICE == "cuda" else 2**-7}  # the interpreter truncates to bfloat16


def plain(left, right, dtype):
    return torch.cat([left.to(dtype), right.to(dtype)], -1)


def make(shape, *dtypes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for dtype in dtypes]


def run(function, tensors, dtype):
    out = function(*tensors, dtype)
    dout = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, dout)]


@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch(shape, dtype):
    for dtypes in itertools.product(DTYPES, repeat=2):
        tensors = make(shape, *dtypes)
        assert_close(run(ops.concatenate, tensors, dtype), run(plain, tensors, dtype), **near)
        with torch.no_grad():
            assert_close(ops.concatenate(*tensors, dtype), plain(*tensors, dtype), **near)


def test_strides_do_not_matter():
    tensors = make(SHAPES["odd"], torch.float32, torch.float32)
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in tensors]
    assert_close(
        run(ops.concatenate, strided, torch.bfloat16), run(plain, tensors, torch.bfloat16), check_stride=False, **near
    )


def test_one_gradient_alone():
    tensors = make(SHAPES["odd"], torch.float32, torch.bfloat16)
    whole = run(plain, tensors, torch.bfloat16)
    for place in (0, 1):
        chosen = [t.detach().requires_grad_(at == place) for at, t in enumerate(tensors)]
        out = ops.concatenate(*chosen, torch.bfloat16)
        dout = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
        assert_close(torch.autograd.grad(out, chosen[place], dout)[0], whole[1 + place], **near)


def test_gradients_of_gradients():
    tensors = [t.detach().double().requires_grad_() for t in make((2, 3, 5), torch.float32, torch.float32)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        check(lambda *args: ops.concatenate(*args, torch.float64), tensors, fast_mode=True)


@every_shape
def test_registration(shape):
    check_registration(lambda: run(ops.concatenate, make(shape, torch.float32, torch.bfloat16), torch.bfloat16))


@every_shape
def test_compiles_whole(shape):
    tensors = make(shape, torch.float32, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(ops.concatenate, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, tensors, torch.bfloat16), run(plain, tensors, torch.bfloat16), **near)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (2, 3, 5)), ((2, 3, 4), (1, 3, 4))], ids=str)
def test_bad_input_is_refused(shapes):
    with pytest.raises(ValueError, match="expected"):
        ops.concatenate(*map(torch.zeros, shapes), torch.float32)
