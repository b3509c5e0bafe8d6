"""dcae_fast._C.relu_linear_attention and its gradient against the formula in float64."""

import pytest
import torch
from accuracy import allowed
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, relative_error

from dcae_fast.models import functional
from dcae_fast.ops.relu_linear_attention import relu_linear_attention_backward_reference

pytestmark = NEEDED

SHAPES = [  # batch, heads, height, width; for clusters of one, two, four and eight blocks
    (3, 1, 5, 7),
    (2, 5, 33, 31),
    (8, 32, 16, 16),
    (1, 32, 32, 32),
    (8, 16, 64, 64),
    (1, 16, 64, 64),
    (1, 1, 100, 90),
    (40, 32, 16, 16),
]
HEAD_DIM, EPS = 32, 1e-15


@pytest.fixture
def attention():
    from dcae_fast import _C

    return lambda *qkvs: _C.relu_linear_attention(list(qkvs), HEAD_DIM, EPS)


@pytest.fixture
def backward():
    from dcae_fast import _C

    return lambda dout, *qkvs: _C.relu_linear_attention_backward(dout, list(qkvs), HEAD_DIM, EPS)


def gradient_of_out(qkv):
    dout = torch.randn_like(qkv[:, : qkv.shape[1] // 3])
    return dout.contiguous(memory_format=torch.channels_last)


def packed(dtype, batch, heads, height, width):
    qkv = torch.randn(batch, heads * 3 * HEAD_DIM, height, width, dtype=dtype, device="cuda")
    return qkv.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(attention, shape, dtype):
    qkv = packed(dtype, *shape)
    expected = functional.relu_linear_attention(qkv.double(), HEAD_DIM, EPS)
    eager = relative_error(functional.relu_linear_attention(qkv, HEAD_DIM, EPS), expected)
    got = attention(qkv)
    assert got.dtype == dtype and got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, expected) <= allowed(eager, dtype)


def parts(qkv):
    """q, k and v, or their gradients."""
    return qkv.reshape(len(qkv), -1, 3, HEAD_DIM, qkv.shape[2] * qkv.shape[3]).unbind(2)


def check_gradient(backward, dout, qkv):
    (expected,) = relu_linear_attention_backward_reference(dout.double(), [qkv.double()], HEAD_DIM, EPS)
    (eager,) = relu_linear_attention_backward_reference(dout, [qkv], HEAD_DIM, EPS)
    (got,) = backward(dout, qkv)
    assert got.dtype == qkv.dtype and got.shape == qkv.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    for mine, plain, exact in zip(parts(got), parts(eager), parts(expected), strict=True):
        assert relative_error(mine, exact) <= allowed(relative_error(plain, exact), qkv.dtype)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_agrees_with_float64(backward, shape, mean):
    qkv = packed(torch.bfloat16, *shape) + mean
    check_gradient(backward, gradient_of_out(qkv), qkv)


def test_gradients_of_scales_are_those_of_each(backward):
    first, second = packed(torch.bfloat16, 2, 3, 9, 11), packed(torch.bfloat16, 2, 1, 9, 11)
    dout = torch.randn(2, 128, 9, 11, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=torch.channels_last)
    got = backward(dout, first, second)
    for mine, qkv, part in zip(got, (first, second), dout.split([96, 32], 1), strict=True):
        assert torch.equal(mine, backward(part.contiguous(memory_format=torch.channels_last), qkv)[0])


def test_scales_lie_side_by_side(attention):
    first, second = packed(torch.bfloat16, 2, 3, 9, 11), packed(torch.bfloat16, 2, 1, 9, 11)
    got = attention(first, second)
    assert torch.equal(got, torch.cat([attention(first), attention(second)], dim=1))


def test_extreme_values(attention):
    """Sums far beyond the range of float16; and zeros, where the quotient is 0 / eps."""
    large = torch.full((1, 96, 64, 64), 1e4, dtype=torch.float16, device="cuda").contiguous(
        memory_format=torch.channels_last
    )
    torch.testing.assert_close(attention(large), large[:, :32], atol=0, rtol=1e-3)
    assert not attention(-large).any()


def test_more_than_2_to_the_31_elements(attention):
    qkv = packed(torch.bfloat16, 1, 1, 64, 64)
    many = qkv.expand(2**31 // qkv.numel() + 2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(attention(many)[-1:], attention(many[:200])[-1:])


def test_gradient_of_more_than_2_to_the_31_elements(backward):
    qkv = packed(torch.bfloat16, 1, 1, 64, 64)
    dout = gradient_of_out(qkv)
    many = [
        tensor.expand(2**31 // qkv.numel() + 2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        for tensor in (dout, qkv)
    ]
    some = [tensor[:400] for tensor in many]
    assert torch.equal(backward(*many)[0][-1:], backward(*some)[0][-1:])


def test_runs_in_a_graph(attention, backward):
    qkv = packed(torch.bfloat16, 1, 4, 32, 32)
    check_in_a_graph(lambda: attention(qkv))
    dout = gradient_of_out(qkv)
    check_in_a_graph(lambda: backward(dout, qkv)[0])


def test_errors_of_the_gradient_name_the_argument(backward):
    qkv = packed(torch.bfloat16, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="dout must have shape"):
        backward(qkv, qkv)
    with pytest.raises(TypeError, match="qkv must be bfloat16"):
        backward(qkv[:, :HEAD_DIM].half(), qkv.half())


def test_errors_name_the_argument(attention):
    qkv = packed(torch.bfloat16, 1, 1, 4, 4)
    with pytest.raises(ValueError, match="qkv must be dense in channels-last"):
        attention(qkv.contiguous())
    with pytest.raises(ValueError, match="the first one's batch and size"):
        attention(qkv, packed(torch.bfloat16, 2, 1, 4, 4))
    with pytest.raises(TypeError, match="qkv must be"):
        attention(qkv, qkv.half())
    with pytest.raises(TypeError, match="qkv must be float16 or bfloat16"):
        attention(qkv.float())
