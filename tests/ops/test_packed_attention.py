"""packed_attention against softmax(q kᵀ / √D) v in float64 and against scaled_dot_product_attention."""

import copy
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch
import torch.nn.functional as F
from accuracy import CEILING, allowed, relative_error

import dcae_fast
from dcae_fast import ops
from dcae_fast.models.transformer import Attention
from dcae_fast.ops import _library
from dcae_fast.ops.packed_attention import packed_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.bfloat16, torch.float16]
OPERATOR, BACKWARD = torch.ops.dcae_fast.packed_attention, torch.ops.dcae_fast.packed_attention_backward
SHAPES = [(2, 66, 3, 72), (1, 17, 2, 64), (3, 1, 1, 64), (1, 321, 1, 64), (2, 9, 2, 40)]  # batch, tokens, heads, dim


def packed(batch, tokens, heads, dim, dtype=torch.float32):
    qkv = torch.randn(batch, tokens, 3 * heads * dim, generator=torch.Generator().manual_seed(tokens))
    return qkv.to(DEVICE, dtype).requires_grad_()


def formula(qkv, heads):
    batch, tokens, channels = qkv.shape
    q, k, v = (x.view(batch, tokens, heads, -1).transpose(1, 2) for x in qkv.split(channels // 3, dim=2))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    p = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bihd", p, v).reshape(batch, tokens, -1)


def sdpa(qkv, heads):
    batch, tokens, channels = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)


def with_gradient(attention, qkv, heads):
    qkv = qkv.detach().requires_grad_()
    out = attention(qkv, heads)
    dout = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, qkv, dout)


def limit(plain, exact, qkv, heads):
    """The allowed error on qkv. plain: the result of scaled_dot_product_attention. On a CPU no kernel runs."""
    tokens, dim = qkv.shape[1], qkv.shape[2] // (3 * heads)
    by_kernel = qkv.is_cuda and ops.is_for_few_tokens(qkv.dtype, tokens, dim, qkv.device)
    return allowed(relative_error(plain, exact), qkv.dtype, by_kernel)


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula_in_float64(shape, dtype):
    qkv, heads = packed(*shape, dtype), shape[2]
    exact = with_gradient(formula, qkv.double(), heads)
    eager = with_gradient(sdpa, qkv, heads)
    for got, want, plain in zip(with_gradient(ops.packed_attention, qkv, heads), exact, eager, strict=True):
        assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
        assert relative_error(got, want) <= limit(plain, want, qkv, heads)


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_gradient(shape, dtype):
    qkv, heads = packed(*shape, dtype).detach(), shape[2]
    exact = formula(qkv.double(), heads)
    with torch.no_grad():
        got = ops.packed_attention(qkv, heads)
    assert got.dtype == dtype and got.is_contiguous()
    assert relative_error(got, exact) <= limit(sdpa(qkv, heads), exact, qkv, heads)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_takes_the_place_of_attention_between_its_projections(dtype):
    attention = Attention(144, 2, qkv_bias=False).to(DEVICE, dtype)
    x = torch.randn(2, 20, 144, device=DEVICE, dtype=dtype)
    exact = copy.deepcopy(attention).double()(x.double())
    got = attention.proj(ops.packed_attention(attention.qkv(x), attention.num_heads))
    assert relative_error(got, exact) <= allowed(relative_error(attention(x), exact), dtype, DEVICE == "cuda")


def test_also_gives_the_logarithm_of_the_denominator():
    qkv = packed(2, 33, 2, 64)
    q, k, _ = qkv.view(2, 33, 3, 2, 64).permute(2, 0, 3, 1, 4)
    _, lse = OPERATOR(qkv, 2)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    exact, eager = ((q.to(t) @ k.to(t).transpose(-1, -2) / 8).logsumexp(-1) for t in (torch.float64, torch.float32))
    assert relative_error(lse, exact) <= allowed(relative_error(eager, exact), torch.float32, DEVICE == "cuda")


def test_no_overflow():
    qkv = packed(1, 33, 1, 72, torch.bfloat16).detach() * 1000
    got = with_gradient(ops.packed_attention, qkv, 1)
    assert all(tensor.isfinite().all() for tensor in got)
    exact, _ = packed_attention_reference(qkv.double(), 1)
    assert relative_error(got[0], exact) <= limit(sdpa(qkv, 1), exact, qkv, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 66, 2, 72), (2, 0, 2, 64)], ids=str)
def test_empty(shape, dtype):
    batch, tokens, heads, dim = shape
    got, gradient = with_gradient(ops.packed_attention, packed(*shape, dtype), heads)
    assert got.shape == (batch, tokens, heads * dim) and gradient.shape == (batch, tokens, 3 * heads * dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout_in_does_not_matter(dtype):
    qkv = packed(2, 18, 2, 64, dtype).detach()
    expected = with_gradient(ops.packed_attention, qkv, 2)
    for strided in (qkv.transpose(0, 1).contiguous().transpose(0, 1), qkv.repeat_interleave(2, -1)[..., ::2]):
        for got, want in zip(with_gradient(ops.packed_attention, strided, 2), expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 18, 2, 72), (1, 321, 1, 64)], ids=str)
def test_compiles_whole(shape, dtype):
    qkv, heads = packed(*shape, dtype), shape[2]
    torch._dynamo.reset()
    compiled = torch.compile(ops.packed_attention, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        with_gradient(compiled, qkv, heads), with_gradient(ops.packed_attention, qkv, heads), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_registration():
    qkv = packed(2, 18, 2, 72, torch.bfloat16)
    torch.library.opcheck(OPERATOR.default, (qkv, 2))
    out, lse = OPERATOR(qkv.detach(), 2)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(BACKWARD.default, (out, qkv.detach(), out, lse, 2), test_utils=utilities)


def test_gradients_of_any_order():
    qkv = torch.randn(1, 5, 3 * 2 * 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = (qkv.requires_grad_(), 2)
    torch.autograd.gradcheck(lambda *args: OPERATOR(*args)[0], inputs, fast_mode=True)
    torch.autograd.gradgradcheck(lambda *args: OPERATOR(*args)[0], inputs, fast_mode=True)


@pytest.fixture
def extension_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    monkeypatch.setattr(dcae_fast, "__path__", [str(tmp_path), *dcae_fast.__path__])
    monkeypatch.delitem(sys.modules, "dcae_fast._C", raising=False)
    monkeypatch.setattr(_library, "EXTENSION_IS_BUILT", True)
    monkeypatch.delitem(vars(_library), "HAS_EXTENSION", raising=False)
    _library.cuda_extension.cache_clear()
    yield
    _library.cuda_extension.cache_clear()
    vars(_library).pop("HAS_EXTENSION", None)


def is_for_few_tokens():
    return ops.is_for_few_tokens(torch.bfloat16, 66, 72, torch.device("cuda", 0))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_extension_that_does_not_load(extension_that_does_not_load, monkeypatch, compiled):
    """One warning says why. Without the extension scaled_dot_product_attention is faster than the operator."""
    monkeypatch.setattr(_library, "is_hopper", lambda device: True)
    torch._dynamo.reset()
    answer = torch.compile(lambda x: x + is_for_few_tokens(), fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="_C is built but does not load: .*too short"):
        assert answer(torch.zeros(())) == 0 if compiled else not is_for_few_tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_for_few_tokens() and _library.cuda_extension() is None
    monkeypatch.setattr(_library, "HAS_EXTENSION", True)
    assert is_for_few_tokens() and answer(torch.zeros(())) == 1


@pytest.mark.parametrize("shape, heads", [((2, 6), 1), ((2, 5, 192), 0), ((2, 5, 190), 1), ((2, 5, 192), 5)])
def test_bad_input_is_refused(shape, heads):
    with pytest.raises(ValueError, match=r"qkv is .*; expected \[B, N, a multiple of 3 \* num_heads\]"):
        ops.packed_attention(torch.zeros(shape), heads)
