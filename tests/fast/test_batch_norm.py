"""Batch norms in training: results, gradients and running statistics match PyTorch's module."""

import copy

import pytest
import torch
from small_models import DEVICE, assert_as_accurate, build_block, image, operators_called, step, step_errors
from torch import nn

import dcae_fast
from dcae_fast.fast.patch import OPERATORS

NAMES = ["ResBlock-batch", "diffusers-ResBlock-batch"]


def with_norm(name: str, **attributes) -> nn.Module:
    """A block whose batch norm has these attributes."""
    block, _ = build_block(name)
    (norm,) = (module for module in block.modules() if type(module) is nn.BatchNorm2d)
    for key, value in attributes.items():
        setattr(norm, key, value)
    return block.train()


def pictures(name: str) -> list[torch.Tensor]:
    return [image(2, 16 if name == "ResBlock-batch" else 8, 2, 4, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics(name, momentum, same_step):
    """With momentum=None the running statistics are the mean over all batches."""
    block = with_norm(name, momentum=momentum)
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    for seed, x in enumerate(pictures(name)):
        same_step(step(fast, x), step(block, x), f"step {seed}")
    assert operators_called(step, fast, x)["res_block"] == 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_gradients(name):
    """Training mode without gradients updates the running statistics, too."""
    block = with_norm(name)
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    for x in pictures(name):
        torch.testing.assert_close(fast(x), block(x))
    for key, value in block.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[key], value)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast(name):
    block = with_norm(name)
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)

    def errors(model, x):
        exact = step(copy.deepcopy(block).double(), x.double())
        with torch.autocast(DEVICE, torch.bfloat16):
            result = step(copy.deepcopy(model), x)
        return result, step_errors(result, exact)

    (result, of_fast), *eager = errors(fast, pictures(name)[0]), *(errors(block, x) for x in pictures(name))
    assert_as_accurate(of_fast, [of_eager for _, of_eager in eager])
    assert all(result[key].dtype == value.dtype for key, value in eager[0][0].items())


@pytest.mark.parametrize("name", NAMES)
def test_one_value_is_refused_as_by_pytorch(name):
    fast, x = with_norm(name), pictures(name)[0][:1, :, :1, :1]
    dcae_fast.patch(fast)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fast(x)


@pytest.mark.parametrize("name", NAMES)
def test_synchronised_norms_are_left_alone(name):
    """`patch` skips SyncBatchNorm, which computes statistics over all ranks."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(with_norm(name))
    reasons = [reason for _, _, reason in dcae_fast.patch(block).skipped]
    assert "its norm is SyncBatchNorm" in reasons


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name, same_step):
    fast, x = with_norm(name), pictures(name)[0]
    dcae_fast.patch(fast)
    expected = step(copy.deepcopy(fast), x)
    torch._dynamo.reset()
    fast.compile(fullgraph=True, backend="aot_eager")
    same_step(step(fast, x), expected)


def test_can_be_disabled():
    assert "batch_norm_act" in OPERATORS
    fast = with_norm("ResBlock-batch")
    dcae_fast.patch(fast, disable=["batch_norm_act"])
    called = operators_called(step, fast, pictures("ResBlock-batch")[0])
    assert not called["batch_norm_act"] and not called["res_block"]
