"""Layers and halves of blocks that train in 8 bit: against plain PyTorch with the same rounding, and against fp32."""

import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from registration import check_registration
from torch.autograd.function import once_differentiable

from dcae_fast import ops
from dcae_fast.ops.gelu_backward_rows import gelu_backward_rows_op, gelu_backward_rows_reference
from dcae_fast.ops.gradient_rows import gradient_rows_op, gradient_rows_reference
from dcae_fast.ops.linear_fp8 import GRADIENT
from dcae_fast.ops.quantize_columns import (
    quantize_columns_op,
    quantize_columns_reference,
    transpose_rows_op,
    transpose_rows_reference,
)
from dcae_fast.ops.quantize_rows import quantize_rows_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EPS, HEADS = 1e-5, 2
FAST_SUMS = 2e-3 if DEVICE == "cuda" else 0  # error of matrix units, which sum float8 products in about 13 bits
HALVES = (torch.bfloat16, torch.float16)
modes = pytest.mark.parametrize("everything", [False, True], ids=["fp8", "fp8-all"])


def rounded(x, dim=-1, format=E4M3):
    """x in fp32 after rounding to 8 bit with a scale for each row, along `dim`."""
    largest = x.abs().amax(dim, keepdim=True).float() / torch.finfo(format).max
    scale = torch.where(largest > 0, torch.exp2(largest.log2().ceil()), 1.0)
    return (x.float() / scale).to(format).float() * scale


def common(x, format=E4M3):
    """The same with one scale for all rows."""
    return rounded(x.flatten()[None], format=format).view(x.shape) if x.numel() else x


class RoundedLinear(torch.autograd.Function):
    """linear_fp8 in plain PyTorch. x: in fp32, of which the gradient of the weight reads x.to(dtype). out: the type of
    the result.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, everything, dtype, out):
        ctx.save_for_backward(x, weight)
        ctx.options = everything, dtype, bias is not None
        return (rounded(x) @ rounded(weight).T + (0 if bias is None else bias.float())).to(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        everything, dtype, has_bias = ctx.options
        dx = rounded(dy, format=GRADIENT) @ rounded(weight, 0)
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        if everything:
            dweight = common(rounded(dy, format=GRADIENT), GRADIENT).T @ common(rounded(x))
        else:
            dweight = dy.to(dtype).float().T @ x.to(dtype).float()
        dbias = dy.float().sum(0).to(weight.dtype) if has_bias else None
        return dx.to(dtype).float(), dweight.to(weight.dtype), dbias, None, None, None


def plain_linear(x, weight, bias, residual, everything, dtype):
    if residual is None:
        return RoundedLinear.apply(x.float(), weight, bias, everything, dtype, dtype)
    return RoundedLinear.apply(x.float(), weight, bias, everything, dtype, residual.dtype) + residual


def plain_half(half, everything, residual, dtype, x, scale, shift, w1, b1, w2, b2, branch=None, gate=None):
    s = x if branch is None else x + gate[:, None] * branch
    y = F.layer_norm(s.float(), s.shape[-1:], eps=EPS)
    y = y * (1 + scale[:, None]) + shift[:, None] if scale.dim() == 2 else y * scale + shift
    h = RoundedLinear.apply(y, w1, b1, everything, dtype, dtype)
    if half == "attention":
        q, k, v = h.float().unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2).to(dtype)
    else:
        y = F.gelu(h.float())
    return s, plain_linear(y, w2, b2, s if residual else None, everything, dtype)


def our_half(half, everything, residual, dtype, x, scale, shift, w1, b1, w2, b2, branch=None, gate=None):
    options = {"branch": branch, "gate": gate, "dtype": dtype, "residual": residual, "everything": everything}
    if half == "attention":
        return ops.norm_attention_fp8(x, scale, shift, EPS, w1, b1, w2, b2, HEADS, **options)
    return ops.norm_mlp_fp8(x, scale, shift, EPS, w1, b1, w2, b2, **options)


def exact_half(half, _, residual, dtype, *tensors):
    """In the tensors' own precision."""
    options = {"dtype": tensors[0].dtype, "residual": residual}
    x, scale, shift, w1, b1, w2, b2, *branch = tensors
    options |= dict(zip(("branch", "gate"), branch, strict=False))
    if half == "attention":
        return ops.norm_attention(x, scale, shift, EPS, w1, b1, w2, b2, HEADS, **options)
    return ops.norm_mlp(x, scale, shift, EPS, w1, b1, w2, b2, **options)


def make(*shapes, dtypes):
    """Random tensors that require gradients; None for the shape None. Weights have rows of different sizes."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for shape, dtype in zip(shapes, dtypes, strict=False):
        if shape is None:
            tensors.append(None)
            continue
        tensor = torch.randn(shape, generator=generator)
        tensor *= (
            torch.exp(0.3 * torch.randn(*shape[:-1], 1, generator=generator)) / shape[-1] ** 0.5
            if len(shape) == 2
            else 1
        )
        tensors.append(tensor.to(DEVICE, dtype).requires_grad_())
    return tensors


def make_half(half, shape, with_branch, bias, dtype, weights=torch.float32):
    """Tokens in fp32, as under autocast."""
    images, tokens, width = shape
    vector = (images, width) if with_branch else (width,)
    inner = 3 * width if half == "attention" else 2 * width
    shapes = [shape, vector, vector, (inner, width), (inner,) if bias else None]
    shapes += [(width, inner if half == "mlp" else width), (width,) if bias else None]
    shapes += [shape, vector] if with_branch else []
    of_norm = dtype if with_branch else torch.float32
    return make(*shapes, dtypes=[torch.float32, of_norm, of_norm, *[weights] * 4, dtype, dtype])


def gradients(results, tensors):
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in results]
    return torch.autograd.grad(results, [t for t in tensors if t is not None], cotangents)


def error(got, exact):
    return ((got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


LINEAR = {  # shape of x, outputs, bias, residual
    "plain": ((2, 5, 32), 48, True, False),
    "residual": ((7, 16), 32, True, True),
    "no_bias": ((3, 33, 16), 16, False, True),
    "odd": ((5, 7), 9, True, False),
    "one_row": ((1, 16), 16, True, False),
    "four_dimensions": ((2, 2, 3, 16), 16, True, True),
    "no_rows": ((0, 16), 32, True, False),
}


@modes
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)
def test_linear_is_the_formula(case, dtype, everything):
    shape, outputs, bias, residual = case
    shapes = shape, (outputs, shape[-1]), (outputs,) if bias else None, (*shape[:-1], outputs) if residual else None
    tensors = make(*shapes, dtypes=[dtype, torch.float32, torch.float32, torch.float32])
    got = ops.linear_fp8(*tensors, everything)
    want = plain_linear(*tensors, everything, dtype)
    assert got.dtype == want.dtype and got.shape == want.shape
    results = [got, *gradients([got], tensors)], [want, *gradients([want], tensors)]
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, theirs) <= max(2 * torch.finfo(dtype).eps, FAST_SUMS)


HALF = {  # half, x's shape, adaLN with a branch, biases, residual
    "attention": ("attention", (2, 5, 32), False, True, True),
    "attention-branch": ("attention", (2, 6, 32), True, True, False),
    "attention-no_bias": ("attention", (3, 7, 48), False, False, True),
    "mlp": ("mlp", (2, 5, 32), False, True, True),
    "mlp-branch": ("mlp", (2, 6, 32), True, True, False),
    "mlp-no_bias": ("mlp", (3, 7, 48), False, False, True),
}
every_half = pytest.mark.parametrize("case", HALF.values(), ids=HALF)


def run_half(function, case, dtype, everything, tensors):
    half, _, with_branch, _, residual = case
    results = function(half, everything, residual, dtype, *tensors)[0 if with_branch else 1 :]
    return [*results, *gradients(results, tensors)]


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_half
def test_a_half_is_the_formula(case, dtype, everything):
    """Where both round the same numbers, they agree; a number that rounds up in one and down in the other is an error
    of one step of the 8-bit type, but rare. Fast sums make it less rare.
    """
    tensors = make_half(*case[:4], dtype)
    got = run_half(our_half, case, dtype, everything, tensors)
    want = run_half(plain_half, case, dtype, everything, tensors)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert error(mine, theirs) <= (1.5e-2 if dtype == torch.float32 else 4e-2) + 10 * FAST_SUMS


@modes
@every_half
def test_error_against_fp32(case, everything):
    tensors = make_half(*case[:4], torch.bfloat16)
    exact = [None if t is None else t.detach().float().requires_grad_() for t in tensors]
    got = run_half(our_half, case, torch.bfloat16, everything, tensors)
    want = run_half(exact_half, case, torch.float32, everything, exact)
    assert all(error(mine, theirs) < 0.15 for mine, theirs in zip(got, want, strict=True))


def test_rows_of_zeros_and_single_large_gradients_do_not_silence_the_others():
    """A common scale for all tokens must come from tokens that have a gradient."""
    x, weight = make((64, 32), (16, 32), dtypes=[torch.bfloat16, torch.float32])
    dy = 1e-6 * torch.randn(64, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    dy[::2] = 0
    found = [torch.autograd.grad(ops.linear_fp8(x, weight, everything=mode), weight, dy)[0] for mode in (False, True)]
    assert found[0].norm() > 0 and error(found[1], found[0]) < 0.06


@modes
def test_one_infinity_makes_gradients_nan(everything):
    x, weight = make((5, 32), (16, 32), dtypes=[torch.bfloat16, torch.float32])
    dy = torch.ones(5, 16, device=DEVICE, dtype=torch.bfloat16)
    dy[1, 2] = torch.inf
    dx, dweight = torch.autograd.grad(ops.linear_fp8(x, weight, everything=everything), (x, weight), dy)
    assert dx[1].isnan().all() and dx[[0, 2, 3, 4]].isfinite().all()
    assert not dweight[2].isfinite().any()


@pytest.mark.parametrize("name, everything", [("attention", True), ("attention-no_bias", False), ("mlp-branch", True)])
def test_registration_of_halves(name, everything):
    case = HALF[name]
    tensors = make_half(*case[:4], torch.bfloat16)
    check_registration(lambda: run_half(our_half, case, torch.bfloat16, everything, tensors))


def test_registration_of_linear():
    tensors = make((2, 5, 32), (48, 32), (48,), (2, 5, 48), dtypes=[torch.bfloat16, *[torch.float32] * 3])
    names = "quantize_rows", "quantize_columns", "transpose_rows", "linear_rows"
    check_registration(
        lambda: gradients([ops.linear_fp8(*tensors, True)], tensors), [f"dcae_fast::{name}" for name in names]
    )


@modes
def test_compiled(everything):
    cases = [HALF["attention-branch"], HALF["mlp"]]
    given = [make_half(*case[:4], torch.bfloat16) for case in cases]

    def compute(attention, mlp):
        results = our_half("attention", everything, False, torch.bfloat16, *attention)
        return *results, our_half("mlp", everything, True, torch.bfloat16, *mlp)[1]

    tensors = [tensor for each in given for tensor in each]
    results = []
    for function in (compute, torch.compile(compute, fullgraph=True, backend="aot_eager")):
        found = function(*given)
        results.append([*found, *gradients(found, tensors)])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_kept_memory():
    """With everything in 8 bit less is kept for the backward pass than in half precision; otherwise as much."""

    def kept(function, everything, tensors):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        half, options = case[0], (case[4], torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = function(half, everything, *options, *tensors)[1]
        assert result.requires_grad
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}
        return sum(size for address, size in storages.items() if address not in given)

    def in_half(half, everything, residual, dtype, *tensors):
        with torch.autocast(DEVICE, enabled=False):
            x, scale, shift, w1, b1, w2, b2, *rest = tensors
            function = ops.norm_attention if half == "attention" else ops.norm_mlp
            heads = [HEADS] if half == "attention" else []
            return function(x, scale, shift, EPS, w1, b1, w2, b2, *heads, dtype=dtype, residual=residual)

    for name in ("attention", "mlp"):
        case = HALF[name]
        tensors = make_half(case[0], (2, 64, 128), *case[2:4], torch.bfloat16)
        fp8, everything = (kept(our_half, mode, tensors) for mode in (False, True))
        assert everything < fp8 <= kept(in_half, None, tensors) + 64


@modes
def test_there_are_no_second_derivatives(everything):
    x, weight = make((4, 16), (16, 16), dtypes=[torch.float32] * 2)
    (dx,) = torch.autograd.grad(ops.linear_fp8(x, weight, everything=everything).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    tensors = make_half(*HALF["mlp"][:4], torch.float32)
    out = our_half("mlp", everything, True, torch.float32, *tensors)[1]
    (dx,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_there_are_no_derivatives_in_transforms():
    """Autograd would round them to float8, and small ones to zero."""
    x, weight = (tensor.detach() for tensor in make((4, 16), (16, 16), dtypes=[torch.float32] * 2))
    with pytest.raises(RuntimeError, match="linear_fp8 has no derivatives in torch.func"):
        torch.func.grad(lambda x: ops.linear_fp8(x, weight).sum())(x)
    with pytest.raises(RuntimeError, match="linear_fp8 has no derivatives"):
        torch.func.jvp(lambda x: ops.linear_fp8(x, weight), (x,), (x,))
    for name in ("attention", "mlp"):
        first, *others = (tensor.detach() for tensor in make_half(*HALF[name][:4], torch.float32))
        call = partial(our_half, name, True, True, torch.float32)
        with pytest.raises(RuntimeError, match=f"norm_{name}_fp8 has no derivatives"):
            torch.func.vjp(lambda x, call=call, others=others: call(x, *others), first)


@pytest.mark.parametrize("shape", [(5, 7), (130, 70), (32, 16), (1, 100), (0, 16)], ids=str)
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_transposed_copies(shape, format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape[0], 1, generator=generator))
    x[1:2] = 0
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(DEVICE, dtype)
        cases = [(transpose_rows_op, transpose_rows_reference, quantize_rows_op(given, "none", format))]
        cases += [(quantize_columns_op, quantize_columns_reference, (given, format))] if shape[0] else []
        for op, reference, args in cases:
            q, scale = op(*args)
            want_q, want_scale = reference(*args)
            padded = -(-shape[0] // 16) * 16
            assert q.shape == (shape[1], padded if op is transpose_rows_op else shape[0]) and scale.shape == (
                shape[1],
                1,
            )
            assert torch.equal(scale, want_scale) and torch.equal(q.float(), want_q.float())
            assert not q.float()[:, shape[0] :].any()
            rounding = 2 ** (-4 if format == E4M3 else -3)
            restored, exact = (
                (q.float() * scale).T[: shape[0]],
                args[0].float() * (1 if op is quantize_columns_op else args[1]),
            )
            smallest = scale.T * 2 ** (-10 if format == E4M3 else -17)  # half the smallest number
            assert ((restored - exact).abs() <= rounding * exact.abs() + smallest).all()


def test_the_grid_of_transposed_copies_fits_any_number_of_tokens(monkeypatch):
    """CUDA allows 65535 programs in all dimensions of a grid but the first."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **options: None

    module = importlib.import_module("dcae_fast.kernels.quantize_columns")
    monkeypatch.setattr(module, "_transpose_rows_kernel", Recorder())
    rows = 65536 * 128
    q = torch.empty(rows, 16, dtype=E4M3, device="meta")
    out, _ = module.launch_transpose_rows(q, torch.empty(rows, 1, device="meta"))
    assert out.shape == (16, rows) and math.prod(grids[0]) == 65536 and max(grids[0][1:], default=1) <= 65535


def test_wide_gradients_have_a_kernel():
    """11200: the inverted channels of SANA-1.6B."""
    args = torch.randn(2, 11200, device=DEVICE), torch.bfloat16, E4M3, True, True
    assert gradient_rows_op.kernel._choose(args) == gradient_rows_op.kernel._run
    for got, want in zip(gradient_rows_op(*args), gradient_rows_reference(*args), strict=True):
        assert error(got.float(), want.float()) < 1e-2


@pytest.mark.parametrize("width", [11200, 16384])
@pytest.mark.parametrize("everything", [False, True], ids=["half", "everything"])
def test_wide_gradients_of_gelu_have_a_kernel(width, everything):
    args = *torch.randn(2, 2, width, device=DEVICE), "gelu", E4M3, everything, True
    assert gelu_backward_rows_op.kernel._choose(args) == gelu_backward_rows_op.kernel._run
    got, want = restored(gelu_backward_rows_op(*args)), restored(gelu_backward_rows_reference(*args))
    for mine, exact in zip(got, want, strict=True):
        assert error(mine, exact) < 1e-2


def restored(results):
    """The results of gelu_backward_rows in fp32, with numbers in place of 8-bit rows and scales."""
    dh, dh_q, dh_scale, g, g_q, g_scale, total = results
    return dh.float(), dh_q.float() * dh_scale, g.float(), g_q.float() * g_scale, total


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("wants_g", [True, False], ids=["g", "no_g"])
@pytest.mark.parametrize("shape", [(37, 80), (2, 3, 16), (4, 33)], ids=str)
@modes
def test_gelu_backward_rows(everything, shape, wants_g, act):
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        dg, h = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
        args = dg, h, act, E4M3, everything, wants_g
        results = gelu_backward_rows_op(*args), gelu_backward_rows_reference(*args)
        for got, want in zip(*results, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
        for got, want in zip(*map(restored, results), strict=True):  # a scale may be the next one
            assert error(got, want) <= 2e-2
        exact = torch.ops.aten.gelu_backward(dg.float(), h.float(), approximate="tanh" if "tanh" in act else "none")
        dh, dh_q, dh_scale, g, g_q, g_scale, total = results[0]
        assert error(dh_q.float() * dh_scale, exact) < 0.04
        assert error(total, exact.flatten(0, -2).sum(0)) < 4e-3
        assert (dh.numel() > 0) != everything and (g.numel() > 0) == (wants_g and not everything)
        assert (g_q.numel() > 0) == (wants_g and everything)


@pytest.mark.parametrize("shape", [(37, 80), (2, 3, 16), (4, 33)], ids=str)
@pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True), (False, False)], ids=str)
def test_gradient_rows(shape, wants):
    for dtype, half in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        args = dy, half, E5M2, *wants
        got, want = gradient_rows_op(*args), gradient_rows_reference(*args)
        assert [(mine.dtype, mine.shape) for mine in got] == [(theirs.dtype, theirs.shape) for theirs in want]
        assert torch.equal(got[1].float(), want[1].float()) and torch.equal(got[2], want[2])
        assert error(got[0], want[0]) < 1e-2 and error(got[3], want[3]) < 1e-5
