"""Inference in half precision, where `patch` also fuses all convolutions, including the first and the last."""

import copy

import pytest
import torch
from small_models import BLOCKS, DEVICE, MODELS, build, build_block, image, operators_called, reconstruct
from torch import nn

import dcae_fast
from dcae_fast.fast import operands
from dcae_fast.models import blocks

EVERYWHERE = {"conv2d", "duplicate_shuffle_add", "rms_norm", "rms_norm_conv2d"}
ATTENTION = {"depthwise_glu", "relu_linear_attention", "unshuffle_average_add"}
OPERATORS = {
    "strided": EVERYWHERE | ATTENTION | {"fold_batch_norm", "multiscale_qkv", "subpixel_weights", "upsample_conv2d"},
    "shuffled": EVERYWHERE | ATTENTION | {"conv2d_unshuffle"},
    "adaptive": EVERYWHERE | {"conv2d_unshuffle"},
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def assert_as_accurate(fast: nn.Module, eager: nn.Module, x: torch.Tensor, what: str = "") -> None:
    """Asserts that the error of fast against float64 is at most twice the error of eager."""
    exact = reconstruct(copy.deepcopy(eager).double(), x.double())
    error, allowed = ((reconstruct(model, x).double() - exact).norm() for model in (fast, eager))
    assert error <= 2 * allowed, what


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, dtype):
    eager, x = build(name, wide=True).to(dtype), image(1, 3, 16, 12).to(dtype)
    fast = copy.deepcopy(eager)
    dcae_fast.patch(fast)
    called = operators_called(assert_as_accurate, fast, eager, x)
    assert called.keys() == OPERATORS[name.removeprefix("diffusers-")]


@pytest.mark.parametrize("name", MODELS)
def test_no_images(name):
    model = build(name).bfloat16()
    dcae_fast.patch(model)
    assert reconstruct(model, image(0, 3, 16, 12).bfloat16()).shape == (0, 3, 16, 12)


@pytest.mark.parametrize("name", MODELS)
def test_models_in_float32_under_autocast(name):
    """The same operators as in half precision. What a frozen model keeps has the type of autocast.

    The norms of diffusers return float32, so that some layers take more operators.
    """
    eager, x = build(name, wide=True), image(1, 3, 16, 12)
    fast = copy.deepcopy(eager)
    dcae_fast.patch(fast, frozen=True)
    exact = reconstruct(copy.deepcopy(eager).double(), x.double())
    with torch.autocast(DEVICE, torch.bfloat16):
        y, of_eager = reconstruct(fast, x), reconstruct(eager, x)
        called = operators_called(lambda: torch.testing.assert_close(reconstruct(fast, x), y, rtol=0, atol=0)).keys()
    assert y.dtype == of_eager.dtype == torch.bfloat16
    assert (y.double() - exact).norm() <= 2 * (of_eager.double() - exact).norm()
    expected = OPERATORS[name.removeprefix("diffusers-")] - {"fold_batch_norm", "subpixel_weights"}  # kept
    assert called == expected or ("diffusers" in name and called >= expected - {"rms_norm_conv2d"})
    assert {tensor.dtype for tensor in operands.kept_by(fast.modules())} == {torch.bfloat16}


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_are_called(name):
    block, x = build_block(name)
    block, x = block.half(), x.half()
    for path, module in block.named_modules():
        if isinstance(module, nn.ModuleList):
            continue
        eager, fast = copy.deepcopy(block), copy.deepcopy(block)
        dcae_fast.patch(fast)
        for model in (eager, fast):
            model.get_submodule(path).register_forward_hook(lambda module, args, output: 1.5 * output)
        assert_as_accurate(fast, eager, x, path)


REPLACEMENTS = [
    ("head", "op_list.0", nn.GroupNorm(2, 8)),
    ("head", "op_list.0", blocks.RMSNorm2d(8, eps=0.1)),
    ("head", "op_list.1", nn.GELU()),
    ("head", "op_list.1", nn.Identity()),
    ("head", "op_list.2", nn.Conv2d(8, 3, 3, padding=1)),
    ("head", "op_list.2", blocks.ConvLayer(8, 3)),
    ("head", "op_list.2", blocks.ConvLayer(8, 16, bias=False)),
    ("head", "op_list.2", blocks.ConvLayer(8, 17)),
    ("head", "op_list.2", blocks.ConvLayer(8, 3, 1)),
    ("head", "op_list.2", blocks.ConvLayer(8, 3, 5)),
    ("head", "op_list.2", blocks.ConvLayer(8, 3, stride=2)),
    ("head", "op_list.2", blocks.ConvLayer(8, 4, groups=2)),
    ("head", "op_list.2", blocks.ConvLayer(8, 3, act="silu")),
    ("head", "op_list.2", blocks.InterpolateConvUpSampleLayer(8, 3)),
    ("head", "op_list.2.conv", nn.Conv2d(8, 12, 3, padding=1)),
    ("head", "op_list.2.conv.conv", nn.Conv2d(8, 12, 3, padding=2, dilation=2)),
    ("head", "op_list.2.conv.conv", nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")),
    ("stem", "conv", nn.Conv2d(3, 2, 3, padding=1)),
    ("stem", "conv", blocks.ConvLayer(3, 2, 1)),
    ("stem", "conv", blocks.ConvLayer(3, 2, act="silu")),
    ("stem", "conv", blocks.ConvLayer(3, 5, bias=False)),
    ("stem", "conv.conv", nn.Conv2d(3, 2, 3, padding="same", padding_mode="circular")),
    ("diffusers-decoder", "conv_out", nn.Conv2d(8, 3, 1)),
    ("diffusers-decoder", "conv_out", nn.Sequential(nn.Conv2d(8, 3, 3, padding=1))),
    ("diffusers-encoder", "conv_in", nn.Conv2d(3, 8, 7, padding=3)),
    ("diffusers-encoder", "conv_in", nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))),
]


@pytest.mark.parametrize("name, path, new", REPLACEMENTS, ids=lambda value: str(value).split("(")[0])
def test_replaced_modules(name, path, new):
    block, x = build_block(name)
    parent, _, attribute = path.rpartition(".")
    setattr(block.get_submodule(parent), attribute, copy.deepcopy(new).to(DEVICE))
    block, x = block.half(), image(1, x.shape[1], 8, 12).half()
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    assert_as_accurate(fast, block, x)
