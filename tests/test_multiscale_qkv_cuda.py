"""dcae_fast._C.multiscale_qkv against the two convolutions in float64."""

import pytest
import torch
from cuda_extension import CEILINGS, NEEDED, check_in_a_graph, relative_error

from dcae_fast.ops.multiscale_qkv import multiscale_qkv_reference

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


@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(multiscale_qkv, shape, dtype):
    tensors = inputs(dtype, *shape)
    got = multiscale_qkv(*tensors)
    expected = multiscale_qkv_reference(*[tensor.double() for tensor in tensors])
    assert got.dtype == dtype and got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    eager = relative_error(multiscale_qkv_reference(*tensors), expected)
    assert relative_error(got, expected) <= min(2 * eager, CEILINGS[dtype])


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


def test_more_than_2_to_the_31_elements(multiscale_qkv):
    x, *weights = inputs(torch.bfloat16, 1, 32, 3, 5)
    many = x.expand(2**31 // x.numel() + 2, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(multiscale_qkv(many, *weights)[-1:], multiscale_qkv(x, *weights))


@pytest.mark.parametrize("shape", [(0, 32, 4, 4), (2, 32, 0, 4)], ids=str)
def test_empty(multiscale_qkv, shape):
    assert multiscale_qkv(*inputs(torch.bfloat16, *shape)).shape == shape


def test_runs_on_the_current_stream_and_in_a_graph(multiscale_qkv):
    tensors = inputs(torch.bfloat16, 1, 64, 16, 16)
    check_in_a_graph(lambda: multiscale_qkv(*tensors))


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
