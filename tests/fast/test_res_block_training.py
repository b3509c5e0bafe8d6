"""When a residual block trains through one operator, and that frozen blocks pass gradients on."""

import copy

import pytest
import torch
from small_models import DEVICE, assert_as_accurate, build_block, operators_called, step, step_errors
from torch import nn

import dcae_fast

NAMES = ["ResBlock", "ResBlock-batch", "diffusers-ResBlock", "diffusers-ResBlock-batch"]
blocks = pytest.mark.parametrize("name", NAMES)


def patched_copy(block: nn.Module) -> nn.Module:
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    return fast


@blocks
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("frozen", ["", "conv1", "norm", "everything"])
def test_frozen_parts(name, train, frozen, same_step):
    block, x = build_block(name)
    block.train(train)
    for path, parameter in block.named_parameters():
        parameter.requires_grad_(frozen != "everything" and (not frozen or frozen not in path))
    fast = patched_copy(block)
    same_step(step(fast, x), step(block, x))
    assert operators_called(step, fast, x)["res_block"] == 1


def convs(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if type(module) is nn.Conv2d]


def wider(block: nn.Module) -> None:
    first, second = convs(block)
    inner = first.out_channels + 8
    for conv, sizes in ((first, (inner, first.in_channels)), (second, (second.out_channels, inner))):
        conv.weight = nn.Parameter(torch.randn(*sizes, 3, 3, device=DEVICE) / 20)
    first.bias = nn.Parameter(torch.randn(inner, device=DEVICE))
    first.out_channels = second.in_channels = inner


def with_hook(block: nn.Module) -> None:
    convs(block)[1].register_forward_hook(lambda module, args, output: 2 * output)


def without_bias(block: nn.Module) -> None:
    convs(block)[0].bias = None


def circular(block: nn.Module) -> None:
    convs(block)[0].padding_mode = "circular"


def dilated(block: nn.Module) -> None:
    convs(block)[0].dilation = convs(block)[0].padding = (2, 2)


@blocks
@pytest.mark.parametrize("change, is_used", [(wider, True), (with_hook, False), (without_bias, False),
                                             (circular, False), (dilated, False)])  # fmt: skip
def test_changed_blocks(name, change, is_used, same_step):
    block, x = build_block(name)
    change(block)
    fast = patched_copy(block)
    same_step(step(fast, x), step(block, x))
    assert operators_called(step, fast, x)["res_block"] == is_used


@blocks
def test_not_without_gradients(name):
    block, x = build_block(name)
    fast = patched_copy(block)
    with torch.no_grad():
        assert not operators_called(fast, x)["res_block"]
    fast.requires_grad_(False)
    assert not operators_called(fast, x)["res_block"]


def test_under_autocast():
    """With SiLU. With ReLU, rounding decides which values become zero, so that errors of gradients jump."""
    block, x = build_block("ResBlock")

    def train_step(model, picture):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=model is not double):
            return step(model, picture.to(torch.float64 if model is double else torch.bfloat16))

    double, pictures = copy.deepcopy(block).double(), [torch.randn_like(x) for _ in range(4)]
    exact = [train_step(double, picture) for picture in pictures]
    eager = [train_step(block, picture) for picture in pictures]
    got = train_step(patched_copy(block), pictures[0])
    assert {key: value.dtype for key, value in got.items()} == {key: value.dtype for key, value in eager[0].items()}
    assert_as_accurate(step_errors(got, exact[0]), list(map(step_errors, eager, exact)))
    assert operators_called(train_step, patched_copy(block), x)["res_block"] == 1
