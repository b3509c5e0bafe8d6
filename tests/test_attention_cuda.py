"""dcae_fast._C.packed_attention and its gradient against the formula in float64."""

import pytest
import torch
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, random, relative_error

from dcae_fast import ops
from dcae_fast.ops.packed_attention import packed_attention_backward_reference, packed_attention_reference

pytestmark = NEEDED

TOKENS = [1, 2, 15, 16, 17, 64, 65, 66, 100, 128, 129, 191, 256, 258, 320]


@pytest.fixture
def attention():
    """(qkv, heads) -> out, lse."""
    from dcae_fast import _C

    return _C.packed_attention


@pytest.fixture
def backward():
    """(dout, qkv, out, lse, heads) -> dqkv."""
    from dcae_fast import _C

    return _C.packed_attention_backward


def sdpa(qkv, heads):
    batch, tokens, channels = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)


def check(attention, backward, qkv, dout, heads):
    """Errors of the result, the gradient and each third of it: at most twice eager SDPA's, and below the ceiling."""
    exact, exact_lse = packed_attention_reference(qkv.double(), heads)
    exact_gradient = packed_attention_backward_reference(dout.double(), qkv.double(), None, None, heads)
    leaf = qkv.clone().requires_grad_()
    eager = sdpa(leaf, heads)
    (eager_gradient,) = torch.autograd.grad(eager, leaf, dout)

    out, lse = attention(qkv, heads)
    gradient = backward(dout, qkv, out, lse, heads)
    assert out.dtype == gradient.dtype == qkv.dtype and out.is_contiguous() and gradient.is_contiguous()
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)
    triples = [(out, exact, eager)]
    triples += [(gradient, exact_gradient, eager_gradient)]
    if qkv.shape[1] > 2:  # with fewer tokens the gradients of q and k are close to zero
        triples += list(zip(*(x.chunk(3, -1) for x in triples[1]), strict=True))
    for got, want, plain in triples:
        limit = max(2 * relative_error(plain, want), 4 * torch.finfo(qkv.dtype).eps)
        assert relative_error(got, want) <= min(limit, CEILINGS[qkv.dtype])


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("tokens", TOKENS)
def test_agrees_with_float64(attention, backward, tokens, dim, dtype):
    torch.manual_seed(tokens)
    for batch, heads in ((1, 1), (3, 5)):
        qkv, dout = random(dtype, batch, tokens, 3 * heads * dim), random(dtype, batch, tokens, heads * dim)
        check(attention, backward, qkv, dout, heads)


@pytest.mark.parametrize("shape", [(300, 66, 16, 72), (40, 258, 16, 72), (40, 256, 12, 64)], ids=str)
def test_agrees_where_blocks_follow_each_other(attention, backward, shape):
    batch, tokens, heads, dim = shape
    qkv = random(torch.bfloat16, batch, tokens, 3 * heads * dim)
    check(attention, backward, qkv, random(torch.bfloat16, batch, tokens, heads * dim), heads)


def test_no_image(attention, backward):
    qkv, dout = random(torch.bfloat16, 0, 66, 432), random(torch.bfloat16, 0, 66, 144)
    out, lse = attention(qkv, 2)
    assert out.shape == dout.shape and lse.shape == (0, 2, 66)
    assert backward(dout, qkv, out, lse, 2).shape == qkv.shape


@pytest.mark.parametrize("tokens", [66, 258])
def test_logits_far_beyond_exp(attention, backward, tokens):
    """Scores of about ±1e4, where one key has all the weight; and equal scores, which give the mean of v."""
    qkv, dout = 30 * random(torch.bfloat16, 2, tokens, 432), random(torch.bfloat16, 2, tokens, 144)
    out, lse = attention(qkv, 2)
    exact, exact_lse = packed_attention_reference(qkv.double(), 2)
    assert relative_error(out, exact) <= CEILINGS[torch.bfloat16]
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-2, rtol=1e-6)
    assert backward(dout, qkv, out, lse, 2).isfinite().all()
    qkv[..., :288] = 0
    mean = qkv[..., 288:].double().mean(1, keepdim=True).expand(-1, tokens, -1)
    assert relative_error(attention(qkv, 2)[0], mean) <= CEILINGS[torch.bfloat16]


@pytest.mark.parametrize("tokens", [66, 258])
def test_an_image_of_nan_stays_alone(attention, backward, tokens):
    """Data that earlier blocks left in shared memory does not reach later blocks."""
    qkv, dout = random(torch.bfloat16, 600, tokens, 432), random(torch.bfloat16, 600, tokens, 144)
    out, lse = attention(qkv, 2)
    expected = out[1::2].clone(), backward(dout, qkv, out, lse, 2)[1::2].clone()
    qkv[::2], dout[::2] = float("nan"), float("nan")
    out, lse = attention(qkv, 2)
    assert torch.equal(out[1::2], expected[0])
    assert torch.equal(backward(dout, qkv, out, lse, 2)[1::2], expected[1])


@pytest.mark.parametrize("tokens", [66, 258])
def test_the_same_twice(attention, backward, tokens):
    qkv, dout = random(torch.bfloat16, 64, tokens, 432), random(torch.bfloat16, 64, tokens, 144)
    out, lse = attention(qkv, 2)
    gradient = backward(dout, qkv, out, lse, 2)
    for _ in range(3):
        again, lse = attention(qkv, 2)
        assert torch.equal(again, out) and torch.equal(backward(dout, qkv, again, lse, 2), gradient)


def test_more_than_2_to_the_31_elements(attention, backward):
    qkv, dout = random(torch.bfloat16, 100, 258, 216), random(torch.bfloat16, 100, 258, 72)
    times = 2**31 // qkv.numel() + 2
    many, many_dout = qkv.repeat(times, 1, 1), dout.repeat(times, 1, 1)
    out, lse = attention(qkv, 1)
    many_out, many_lse = attention(many, 1)
    assert torch.equal(many_out[-100:], out)
    assert torch.equal(backward(many_dout, many, many_out, many_lse, 1)[-100:], backward(dout, qkv, out, lse, 1))


@pytest.mark.parametrize("tokens", [66, 258])
def test_runs_in_a_graph(attention, backward, tokens):
    qkv, dout = random(torch.bfloat16, 4, tokens, 432), random(torch.bfloat16, 4, tokens, 144)
    out, lse = attention(qkv, 2)
    check_in_a_graph(lambda: attention(qkv, 2)[0])
    check_in_a_graph(lambda: attention(qkv, 2)[1])
    check_in_a_graph(lambda: backward(dout, qkv, out, lse, 2))


def test_the_operator_runs_it(attention, backward):
    """The operator agrees through autograd, with strided tensors, compiled and not compiled."""
    qkv, dout = random(torch.bfloat16, 66, 4, 432).transpose(0, 1), random(torch.bfloat16, 66, 4, 144).transpose(0, 1)
    out, lse = attention(qkv.contiguous(), 2)
    gradient = backward(dout.contiguous(), qkv.contiguous(), out, lse, 2)
    leaf = qkv.clone().requires_grad_()
    for call in (ops.packed_attention, torch.compile(ops.packed_attention, fullgraph=True)):
        got = call(leaf, 2)
        assert torch.equal(got, out) and torch.equal(torch.autograd.grad(got, leaf, dout)[0], gradient)
    with torch.inference_mode():
        assert torch.equal(ops.packed_attention(qkv, 2), out)


def test_errors_name_the_argument(attention, backward):
    qkv = random(torch.bfloat16, 2, 66, 432)
    out, lse = attention(qkv, 2)
    with pytest.raises(ValueError, match="qkv must have 64 or 72 channels a head, got 144"):
        attention(qkv, 1)
    with pytest.raises(ValueError, match="qkv must have 1 to 320 tokens, got 321"):
        attention(random(torch.bfloat16, 1, 321, 192), 1)
    with pytest.raises(ValueError, match="qkv must be contiguous"):
        attention(qkv.transpose(0, 1), 2)
    with pytest.raises(TypeError, match="qkv must be float16 or bfloat16"):
        attention(qkv.float(), 2)
    with pytest.raises(ValueError, match="dout must have shape"):
        backward(out[:1], qkv, out, lse, 2)
    with pytest.raises(TypeError, match="lse must be Float"):
        backward(out, qkv, out, lse.double(), 2)
