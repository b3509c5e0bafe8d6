"""dcae_fast._C.multiscale_qkv and its gradients against the two convolutions in float64."""

import pytest
import torch
from accuracy import allowed
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, relative_error

from dcae_fast.ops.multiscale_qkv import multiscale_qkv_backward_reference, multiscale_qkv_reference

pytestmark = NEEDED

SHAPES = [  # batch, channels, height, width
    (1, 32, 1, 1),
    (3, 32, 1, 40),
    (2, 96, 37, 1),
    (2, 64, 5, 3),
    (1, 128, 16, 16),
    (5, 160, 9, 17),
    (1, 96, 23, 33),
    (8, 3072, 16, 16),
    (1, 1536, 64, 64),
]


def inputs(dtype, batch, channels, height, width):
    x = torch.randn(batch, channels, height, width, dtype=dtype, device="cuda")
    depthwise = torch.randn(channels, 1, 5, 5, dtype=dtype, device="cuda") / 5
    grouped = torch.randn(channels, 32, 1, 1, dtype=dtype, device="cuda") / 32**0.5
    return x.contiguous(memory_format=torch.channels_last), depthwise, grouped


@pytest.fixture
def multiscale_qkv():
    from dcae_fast import _C

    return _C.multiscale_qkv


@pytest.fixture
def multiscale_qkv_backward():
    from dcae_fast import _C

    return _C.multiscale_qkv_backward


def with_gradient(tensors):
    """The gradient of the result, then the tensors."""
    return torch.randn_like(tensors[0]), *tensors


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(multiscale_qkv, shape, dtype):
    tensors = inputs(dtype, *shape)
    got = multiscale_qkv(*tensors)
    expected = multiscale_qkv_reference(*[tensor.double() for tensor in tensors])
    assert got.dtype == dtype and got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    eager = relative_error(multiscale_qkv_reference(*tensors), expected)
    assert relative_error(got, expected) <= allowed(eager, dtype)


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-2], ids=str)
def test_gradients_agree_with_float64(multiscale_qkv_backward, shape, dtype):
    tensors = with_gradient(inputs(dtype, *shape))
    got = multiscale_qkv_backward(*tensors, True)
    alone = multiscale_qkv_backward(*tensors, False)
    assert torch.equal(alone[0], got[0]) and alone[1].numel() == alone[2].numel() == 0
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    expected = multiscale_qkv_backward_reference(*[tensor.double() for tensor in tensors], True)
    eager = multiscale_qkv_backward_reference(*tensors, True)
    for mine, plain, exact in zip(got, eager, expected, strict=True):
        assert mine.dtype == dtype and mine.shape == exact.shape
        assert relative_error(mine, exact) <= allowed(relative_error(plain, exact), dtype)


@pytest.mark.parametrize("shape", [(8, 3072, 16, 16), (16, 1536, 32, 32)], ids=str)
def test_gradients_by_weights_are_those_of_parts(multiscale_qkv_backward, shape):
    """At real sizes, many blocks share the pixels. The gradients of the images add up to the gradient of the batch."""
    dout, x, *weights = with_gradient(inputs(torch.bfloat16, *shape))
    wide = [weight.float() for weight in weights]
    got = multiscale_qkv_backward(dout, x, *wide, True)
    parts = [multiscale_qkv_backward(d, i, *wide, True) for d, i in zip(dout.split(1), x.split(1), strict=True)]
    assert torch.equal(got[0], torch.cat([part[0] for part in parts]))
    for index in (1, 2):
        assert relative_error(got[index], sum(part[index].double() for part in parts)) <= 1e-5


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
def test_gradients_by_weights_in_float32_are_not_rounded(multiscale_qkv_backward, dtype):
    dout, x, *weights = with_gradient(inputs(dtype, 2, 96, 9, 17))
    wide = [weight.float() * (1 + torch.finfo(dtype).eps / 8) for weight in weights]
    exact, rounded = multiscale_qkv_backward(dout, x, *wide, True), multiscale_qkv_backward(dout, x, *weights, True)
    assert exact[1].dtype == exact[2].dtype == torch.float32
    for got, want in zip(exact, rounded, strict=True):
        assert torch.equal(got.to(dtype), want)


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
def test_weights_in_float32_are_rounded(multiscale_qkv, dtype):
    x, *weights = inputs(dtype, 2, 96, 9, 17)
    wide = [weight.float() * (1 + torch.finfo(dtype).eps / 8) for weight in weights]
    assert torch.equal(multiscale_qkv(x, *wide), multiscale_qkv(x, *weights))


def test_padding_is_zero_beside_nan(multiscale_qkv):
    """A NaN reaches only its 5×5 neighbours in its group of channels."""
    x, *weights = inputs(torch.bfloat16, 2, 64, 9, 18)
    x[0, 3, 2, 15] = float("nan")
    expected = torch.zeros(2, 64, 9, 18, dtype=torch.bool, device="cuda")
    expected[0, :32, 0:5, 13:18] = True
    assert torch.equal(multiscale_qkv(x, *weights).isnan(), expected)


def test_gradient_beside_nan(multiscale_qkv_backward):
    dout, x, *weights = with_gradient(inputs(torch.bfloat16, 2, 64, 9, 18))
    dout[0, 3, 2, 15] = float("nan")
    expected = torch.zeros(2, 64, 9, 18, dtype=torch.bool, device="cuda")
    expected[0, :32, 0:5, 13:18] = True
    dx, ddepthwise, dgrouped = multiscale_qkv_backward(dout, x, *weights, True)
    assert torch.equal(dx.isnan(), expected)
    assert not ddepthwise[32:].isnan().any() and not dgrouped[32:].isnan().any()


def test_more_than_2_to_the_31_elements(multiscale_qkv):
    x, *weights = inputs(torch.bfloat16, 1, 32, 3, 5)
    many = x.expand(2**31 // x.numel() + 2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(multiscale_qkv(many, *weights)[-1:], multiscale_qkv(x, *weights))


def test_gradients_of_more_than_2_to_the_31_elements(multiscale_qkv_backward):
    dout, x, *weights = with_gradient(inputs(torch.bfloat16, 1, 32, 3, 5))
    many = [
        tensor.expand(2**31 // x.numel() + 2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        for tensor in (dout, x)
    ]
    got, one = multiscale_qkv_backward(*many, *weights, True), multiscale_qkv_backward(dout, x, *weights, True)
    assert torch.equal(got[0][-1:], one[0])
    for index in (1, 2):
        assert relative_error(got[index], one[index].double() * len(many[0])) <= CEILINGS[torch.bfloat16]


@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 0, 4)], ids=str)
def test_empty(multiscale_qkv, multiscale_qkv_backward, shape):
    tensors = inputs(torch.bfloat16, *shape)
    assert multiscale_qkv(*tensors).shape == shape
    dx, *of_weights = multiscale_qkv_backward(*with_gradient(tensors), True)
    assert dx.shape == shape and not any(gradient.any() for gradient in of_weights)


def test_runs_on_the_current_stream_and_in_a_graph(multiscale_qkv, multiscale_qkv_backward):
    tensors = inputs(torch.bfloat16, 1, 64, 16, 16)
    check_in_a_graph(lambda: multiscale_qkv(*tensors))
    tensors = with_gradient(tensors)
    for index in range(3):
        check_in_a_graph(lambda index=index: multiscale_qkv_backward(*tensors, True)[index])


def test_errors_name_the_argument(multiscale_qkv):
    x, depthwise, grouped = inputs(torch.bfloat16, 1, 32, 4, 4)
    with pytest.raises(ValueError, match="x must have shape"):
        multiscale_qkv(x[:, :16].contiguous(memory_format=torch.channels_last), depthwise, grouped)
    with pytest.raises(ValueError, match="channels-last"):
        multiscale_qkv(x.contiguous(), depthwise, grouped)
    with pytest.raises(ValueError, match="depthwise must have shape"):
        multiscale_qkv(x, depthwise[:, :, :3, :3].contiguous(), grouped)
    with pytest.raises(TypeError, match="x must be float16 or bfloat16"):
        multiscale_qkv(x.float(), depthwise, grouped)
    with pytest.raises(TypeError, match="grouped must be"):
        multiscale_qkv(x, depthwise, grouped.double())


def test_errors_of_the_gradient_name_the_argument(multiscale_qkv_backward):
    dout, *tensors = with_gradient(inputs(torch.bfloat16, 1, 32, 4, 4))
    with pytest.raises(ValueError, match="dout must have shape"):
        multiscale_qkv_backward(dout[:, :, :2].contiguous(memory_format=torch.channels_last), *tensors, True)
    with pytest.raises(TypeError, match="dout must be"):
        multiscale_qkv_backward(dout.half(), *tensors, True)
