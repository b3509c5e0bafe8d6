"""Prepared weights of convolutions do what the convolution and what stands around it do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcae_fast import ops
from dcae_fast.ops.shuffle import to_planes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE, dtype)


def test_folded_weight_and_shift_are_convolution_and_batch_norm():
    norm = nn.BatchNorm2d(6, eps=1e-3).to(DEVICE, torch.float64).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(random(6))
        norm.running_var.copy_(random(6).square() + 0.1)
    x, weight = random(2, 5, 4, 7), random(6, 5, 3, 3)
    statistics = norm.bias, norm.weight, norm.running_mean, norm.running_var, norm.eps
    folded, shift = ops.fold_batch_norm(weight, *statistics)
    expected = norm(F.conv2d(x, weight, padding=1))
    torch.testing.assert_close(F.conv2d(x, folded, shift, padding=1), expected)
    assert folded.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels, filters, height, width", [(3, 4, 2, 5), (8, 1, 1, 1)])
def test_subpixel_weights_are_up_sampling_and_convolution(channels, filters, height, width):
    x, weight = random(2, channels, height, width), random(filters, channels, 3, 3)
    expected = to_planes(F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1))
    weights = ops.subpixel_weights(weight)
    assert weights.shape == (4 * filters, channels, 2, 2) and weights.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.upsample_conv2d(x, weights), expected)


@pytest.mark.parametrize("channels, filters, height, width", [(3, 4, 2, 5), (8, 1, 1, 1)])
def test_transposed_weights_are_up_sampling_and_convolution(channels, filters, height, width):
    x, weight = random(2, channels, height, width), random(filters, channels, 3, 3)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    transposed = ops.transposed_weights(weight)
    assert transposed.shape == (channels, filters, 4, 4)
    assert transposed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(F.conv_transpose2d(x, transposed, stride=2, padding=1), expected)


@pytest.mark.parametrize("operator", [ops.subpixel_weights, ops.transposed_weights])
def test_a_float32_weight_is_rounded_once_and_its_gradient_is_float32(operator):
    """Triton's interpreter truncates to bfloat16 where a GPU rounds."""
    weight = random(8, 16, 3, 3).float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        rounded, wide = operator(weight, torch.bfloat16), operator(weight)
        assert (rounded.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(rounded.float(), wide, rtol=2**-7, atol=0)
    drounded = random(*rounded.shape).bfloat16()
    (got,) = torch.autograd.grad(rounded, weight, drounded)
    (expected,) = torch.autograd.grad(wide, weight, drounded.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", [0, 7])
def test_results_have_the_type_of_the_weight_and_are_rounded_once(dtype, filters):
    weight, vector = random(filters, 16, 3, 3, dtype=dtype), random(filters).float()
    wide = weight.double()
    folded, shift = ops.fold_batch_norm(weight, vector, vector, vector, vector.square(), 1e-5)
    double = vector.double()
    expected, expected_shift = ops.fold_batch_norm(wide, double, double, double, double.square(), 1e-5)
    eps = 2 * torch.finfo(dtype).eps
    for got, want in [
        (folded, expected),
        (shift, expected_shift),
        (ops.subpixel_weights(weight), ops.subpixel_weights(wide)),
        (ops.transposed_weights(weight), ops.transposed_weights(wide)),
    ]:
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps)
