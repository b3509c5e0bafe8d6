"""dcae_fast._C.depthwise_glu and its backward against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import allowed
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, relative_error

pytestmark = NEEDED

SHAPES = [  # batch, M, height, width
    (1, 8, 1, 1),
    (3, 8, 1, 40),
    (2, 72, 37, 1),
    (2, 56, 5, 3),
    (1, 64, 16, 16),
    (1, 136, 23, 33),
    (5, 200, 9, 17),
    (1, 2048, 64, 64),
    (8, 4096, 16, 16),
]


def formula(x, weight, bias):
    value, gate = F.conv2d(x, weight, bias, padding=1, groups=x.shape[1]).chunk(2, dim=1)
    return value * F.silu(gate)


def inputs(dtype, batch, channels, height, width):
    torch.manual_seed(0)
    x = torch.randn(batch, 2 * channels, height, width, dtype=dtype, device="cuda")
    weight = torch.randn(2 * channels, 1, 3, 3, dtype=dtype, device="cuda") / 3
    bias = torch.randn(2 * channels, dtype=dtype, device="cuda")
    return x.contiguous(memory_format=torch.channels_last), weight, bias


@pytest.fixture
def depthwise_glu():
    from dcae_fast import _C

    return _C.depthwise_glu


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(depthwise_glu, shape, with_bias, dtype):
    x, weight, bias = inputs(dtype, *shape)
    bias = bias if with_bias else None
    got = depthwise_glu(x, weight, bias)
    expected = formula(x.double(), weight.double(), bias.double() if with_bias else None)
    eager = relative_error(formula(x, weight, bias), expected)
    assert got.dtype == dtype and got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, expected) <= allowed(eager, dtype)


def gradients(dout, x, weight, bias):
    tensors = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    return torch.autograd.grad(formula(*tensors), tensors, dout)


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_agree_with_float64(shape, dtype):
    from dcae_fast import _C

    x, weight, bias = inputs(dtype, *shape)
    dout = torch.randn_like(x[:, : shape[1]])
    got = _C.depthwise_glu_backward(dout.contiguous(memory_format=torch.channels_last), x, weight, bias)
    expected = gradients(dout.double(), x.double(), weight.double(), bias.double())
    eager = gradients(dout, x, weight, bias)
    alone = _C.depthwise_glu_backward(dout.contiguous(memory_format=torch.channels_last), x, weight, bias, False)
    assert torch.equal(alone[0], got[0]) and alone[1].numel() == alone[2].numel() == 0
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    for mine, plain, exact in zip(got, eager, expected, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert relative_error(mine, exact) <= allowed(relative_error(plain, exact), dtype)


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
def test_parameters_in_float32_are_rounded_and_their_gradients_are_not(depthwise_glu, dtype):
    from dcae_fast import _C

    x, weight, bias = inputs(dtype, 2, 72, 9, 17)
    dout = torch.randn_like(x[:, :72]).contiguous(memory_format=torch.channels_last)
    wide = weight.float() * (1 + torch.finfo(dtype).eps / 8), bias.float()
    assert torch.equal(depthwise_glu(x, *wide), depthwise_glu(x, weight, bias))
    exact, rounded = _C.depthwise_glu_backward(dout, x, *wide), _C.depthwise_glu_backward(dout, x, weight, bias)
    assert exact[1].dtype == exact[2].dtype == torch.float32
    for got, want in zip(exact, rounded, strict=True):
        assert torch.equal(got.to(dtype), want)


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
def test_extreme_values(depthwise_glu, dtype):
    x, weight, bias = inputs(dtype, 2, 24, 7, 19)
    x[0] *= 1e4 if dtype == torch.bfloat16 else 30
    x[1] *= 1e-3
    got = depthwise_glu(x, weight, bias)
    assert relative_error(got, formula(x.double(), weight.double(), bias.double())) <= CEILINGS[dtype]


def test_padding_is_zero_beside_nan(depthwise_glu):
    """A NaN reaches only its neighbours and their gated partners, and no other row, column or image."""
    x, weight, bias = inputs(torch.bfloat16, 2, 8, 6, 18)
    x[0, 3, 2, 15] = float("nan")
    expected = torch.zeros(2, 8, 6, 18, dtype=torch.bool, device="cuda")
    expected[0, 3, 1:4, 14:17] = True
    assert torch.equal(depthwise_glu(x, weight, bias).isnan(), expected)


def test_more_than_2_to_the_31_elements(depthwise_glu):
    x, weight, bias = inputs(torch.bfloat16, 1, 8, 3, 5)
    many = x.expand(2**31 // x.numel() + 2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    got = depthwise_glu(many, weight, bias)
    assert torch.equal(got[-1:], depthwise_glu(x, weight, bias))


@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)], ids=str)
def test_empty(depthwise_glu, shape):
    from dcae_fast import _C

    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    weight = torch.ones(16, 1, 3, 3, dtype=torch.bfloat16, device="cuda")
    out = depthwise_glu(x, weight, None)
    assert out.shape == (shape[0], 8, *shape[2:])
    dx, dweight, dbias = _C.depthwise_glu_backward(out, x, weight, weight[:, 0, 0, 0].clone())
    assert dx.shape == x.shape and not dweight.any() and not dbias.any()


def test_runs_on_the_current_stream_and_in_a_graph(depthwise_glu):
    x, weight, bias = inputs(torch.bfloat16, 1, 64, 16, 16)
    check_in_a_graph(lambda: depthwise_glu(x, weight, bias))


def test_errors_name_the_argument(depthwise_glu):
    from dcae_fast import _C

    x, weight, bias = inputs(torch.bfloat16, 1, 8, 4, 4)
    with pytest.raises(ValueError, match="x must have shape"):
        depthwise_glu(x[:, :8].contiguous(memory_format=torch.channels_last), weight, bias)
    with pytest.raises(ValueError, match="channels-last"):
        depthwise_glu(x.contiguous(), weight, bias)
    with pytest.raises(ValueError, match="weight must have shape"):
        depthwise_glu(x, weight[:8], bias)
    with pytest.raises(TypeError, match="x must be float16 or bfloat16"):
        depthwise_glu(x.float(), weight, bias)
    with pytest.raises(TypeError, match="bias must be"):
        depthwise_glu(x, weight, bias.double())
    with pytest.raises(ValueError, match="x must be on a CUDA device"):
        depthwise_glu(x.cpu(), weight, bias)
    with pytest.raises(ValueError, match="dout must have shape"):
        _C.depthwise_glu_backward(x, x, weight, bias)
