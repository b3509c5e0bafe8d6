"""`layer_norm` against PyTorch's own layers: results, gradients, types, registration."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import CEILING, allowed, relative_error
from registration import check_registration
from torch.testing import assert_close

from dcae_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
CASES = {  # shape of x; whether scale and shift are the image's own; whether there is a branch
    "parameters": ((2, 5, 24), False, False),
    "parameters-wide": ((3, 2, 1152), False, False),
    "parameters-odd": ((1, 7, 130), False, False),
    "of_image": ((3, 5, 48), True, False),
    "of_image-odd": ((2, 3, 37), True, False),
    "branch": ((3, 5, 48), True, True),
    "branch-one_token": ((4, 1, 72), True, True),
    "branch-wide": ((2, 3, 1152), True, True),
    "no_images": ((0, 4, 16), False, False),
    "no_tokens": ((2, 0, 16), True, True),
}
every_case = pytest.mark.parametrize("shape, of_image, branch", CASES.values(), ids=CASES)


def plain(x, scale, shift, branch=None, gate=None, dtype=None):
    x = x if branch is None else x + gate[:, None] * branch
    y = F.layer_norm(x, x.shape[-1:], eps=EPS)
    y = y * (1 + scale[:, None]) + shift[:, None] if scale.dim() == 2 else y * scale + shift
    return x, y.to(dtype or x.dtype)


def ours(x, scale, shift, branch=None, gate=None, dtype=None):
    return ops.layer_norm(x, scale, shift, EPS, branch, gate, dtype)


def make(shape, of_image, branch, dtype, parameter_dtype=None):
    generator, (images, _, width) = torch.Generator().manual_seed(0), shape
    vector = (images, width) if of_image else (width,)
    shapes = [shape, vector, vector, *([shape, vector] if branch else [])]
    dtypes = [dtype, parameter_dtype or dtype, parameter_dtype or dtype, dtype, parameter_dtype or dtype]
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, kind).requires_grad_()
        for size, kind in zip(shapes, dtypes, strict=False)
    ]


def run(function, tensors, dtype=None):
    """Both results and all gradients, for fixed cotangents."""
    results = function(*tensors, dtype=dtype)
    cotangents = [
        torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view(y.shape).to(y.dtype)
        for y in results
    ]
    return [*results, *torch.autograd.grad(results, tensors, cotangents)]


@every_case
@pytest.mark.parametrize("dtype", CEILING, ids=str)
def test_matches_the_formula_in_float64(shape, of_image, branch, dtype):
    tensors = make(shape, of_image, branch, dtype)
    exact = run(plain, [tensor.detach().double().requires_grad_() for tensor in tensors])
    for got, eager, want in zip(run(ours, tensors), run(plain, tensors), exact, strict=True):
        assert got.dtype == eager.dtype and got.shape == eager.shape
        assert relative_error(got, want) <= allowed(relative_error(eager, want), dtype)


@every_case
def test_from_float32_to_half_precision(shape, of_image, branch):
    """The types of autocast: the sum stays in float32, the norm is rounded once."""
    tensors = make(shape, of_image, branch, torch.float32, torch.bfloat16 if of_image else None)
    total, y, *gradients = run(ours, tensors, torch.bfloat16)
    assert total.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors]
    exact = run(plain, [tensor.detach().double().requires_grad_() for tensor in tensors])
    for got, want in zip([total, y, *gradients], exact, strict=True):
        assert relative_error(got, want) <= CEILING[torch.bfloat16]


@pytest.mark.parametrize("place", range(3), ids=["x", "branch", "gate"])
def test_sum_has_the_promoted_type(place):
    """The promoted type of x, branch and gate, as in plain PyTorch and in the operator's fake."""
    tensors = [tensor.detach() for tensor in make(*CASES["branch"], torch.bfloat16)]
    chosen = (0, 3, 4)[place]
    tensors[chosen] = tensors[chosen].float().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: ours(*args), fullgraph=True, backend="aot_eager")
    for function in (ours, lambda *args: compiled(*args)):
        total, y = function(*tensors)
        assert (total.dtype, y.dtype) == (torch.float32, tensors[0].dtype)
        (gradient,) = torch.autograd.grad(total.sum() + y.sum(), tensors[chosen])
        assert gradient.dtype == torch.float32


@every_case
def test_registration(shape, of_image, branch):
    tensors = make(shape, of_image, branch, torch.float32)

    def train_and_infer():
        run(ours, tensors)
        with torch.no_grad():
            ours(*tensors)

    check_registration(train_and_infer)


@every_case
def test_compiles_whole(shape, of_image, branch):
    tensors = make(shape, of_image, branch, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: ours(*args), fullgraph=True, backend="aot_eager")
    assert_close(run(lambda *args, dtype: compiled(*args), tensors), run(ours, tensors), atol=0, rtol=0)


def test_gradients_of_gradients():
    for shape, of_image, branch in (CASES["parameters"], CASES["branch"]):
        tensors = make(shape, of_image, branch, torch.float64)
        torch.autograd.gradcheck(ours, tensors, fast_mode=True)
        torch.autograd.gradgradcheck(ours, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gate_without_gradient(dtype):
    """Only the sum is kept. The gradients are as exact as with the terms, also if the branch has the widest type."""
    *tensors, gate = make(*CASES["branch"], dtype)
    tensors[3] = tensors[3].detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    gate = gate.detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        ours(*tensors, gate)
    assert tensors[0].data_ptr() not in kept and tensors[3].data_ptr() not in kept

    exact = run(lambda *args, **_: plain(*args, gate.double()), [t.detach().double().requires_grad_() for t in tensors])
    got = run(lambda *args, dtype: ours(*args, gate, dtype=dtype), tensors)
    whole = run(ours, [*tensors, gate.requires_grad_()])
    for mine, kept_gate, want in zip(got, whole, exact, strict=False):
        assert mine.dtype == kept_gate.dtype
        limit = 2 * relative_error(kept_gate, want)
        assert relative_error(mine, want) <= max(limit, 4 * torch.finfo(mine.dtype).eps)
    if dtype == torch.float64:
        torch.autograd.gradgradcheck(lambda *args: ours(*args, gate.detach()), tensors, fast_mode=True)


def test_strides_do_not_matter():
    tensors = make(*CASES["branch"], torch.float32)
    strided = [tensor.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for tensor in tensors]
    assert_close(run(ours, strided), run(ours, tensors), atol=0, rtol=0)


def test_only_one_result_has_a_gradient():
    tensors = make(*CASES["branch"], torch.float64)
    for place in (0, 1):
        got = torch.autograd.grad(ours(*tensors)[place].square().sum(), tensors, allow_unused=True)
        want = torch.autograd.grad(plain(*tensors)[place].square().sum(), tensors, allow_unused=True)
        for mine, other in zip(got, want, strict=True):
            assert_close(mine, torch.zeros_like(mine) if other is None else other)


def test_large_mean_and_constant_tokens():
    x, scale, shift = make((2, 3, 256), False, False, torch.float32)
    x = x.detach() + 1e3
    assert relative_error(ours(x, scale, shift)[1], plain(*(t.double() for t in (x, scale, shift)))[1]) <= 1e-4
    constant = torch.full_like(x, 3.0)
    assert_close(ours(constant, scale, shift)[1], shift.expand_as(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, v: ops.layer_norm(x[0], v[0], v[0], EPS),
        lambda x, v: ops.layer_norm(x, v[0], v, EPS),
        lambda x, v: ops.layer_norm(x, v[0, :3], v[0, :3], EPS),
        lambda x, v: ops.layer_norm(x, v, v, EPS, x),
        lambda x, v: ops.layer_norm(x, v[0], v[0], EPS, x, v),
        lambda x, v: ops.layer_norm(x, v, v, EPS, x[:, :1], v),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="expected"):
        call(torch.randn(2, 3, 8), torch.randn(2, 8))
