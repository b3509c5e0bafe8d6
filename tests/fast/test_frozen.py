"""patch(model, frozen=True): inference keeps operands, and makes them again when weights change."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from graph_tape import CAPTURED, REPLAYED, SEEN, counts
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from small_models import DEVICE, build, build_block, duplicates, image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import AveragedModel

import dcae_fast
from dcae_fast.fast import operands
from dcae_fast.models import UViT, UViTConfig

NETWORK = UViTConfig(in_channels=4, input_size=2, depth=2, hidden_size=64, num_heads=1, num_classes=3)
MODELS = ["ResBlock-batch", "up-interpolate", "diffusers-EfficientViTBlock", "uvit"]  # with each kind of operand


def new_model(name: str) -> nn.Module:
    """A block in bfloat16, for which convolutions are fused; or a transformer in float32, called under autocast."""
    if name != "uvit":
        return build_block(name)[0].bfloat16()
    torch.manual_seed(0)
    return UViT(NETWORK).eval().to(DEVICE)


def called(model: nn.Module) -> torch.Tensor:
    if isinstance(model, UViT):
        with torch.autocast(DEVICE, torch.bfloat16):
            t, y = torch.tensor([3.0, 700.0], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
            return model(image(2, 4, 2, 2), t, y)
    return model(image(2, 16, 2, 4).to(next(model.parameters()).dtype))


@torch.no_grad()
def result(model: nn.Module) -> torch.Tensor:
    return called(model)


def kept(model: nn.Module) -> list[torch.Tensor]:
    return operands.kept_by(model.modules())


def expected_of(model: nn.Module) -> torch.Tensor:
    """The result with the present weights, of a copy that keeps nothing."""
    other = copy.deepcopy(model)
    dcae_fast.patch(other)
    return result(other)


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    """A frozen model that has been called."""
    model = new_model(request.param)
    dcae_fast.patch(model, frozen=True)
    result(model)
    return model


def test_the_same_result_from_operands_that_are_kept(model):
    before = kept(model)
    derived = [tensor for tensor in before if not isinstance(tensor, nn.Parameter)]
    assert derived and not any(tensor.requires_grad or tensor.is_inference() for tensor in derived)
    assert torch.equal(result(model), expected_of(model))
    with torch.inference_mode():
        assert torch.equal(result(model), expected_of(model))
    assert list(map(id, kept(model))) == list(map(id, before))


def test_nothing_is_kept_by_default():
    model = new_model("ResBlock-batch")
    dcae_fast.patch(model)
    result(model)
    assert kept(model) is None


def first_weight(model: nn.Module) -> nn.Parameter:
    """Of a layer that keeps operands."""
    return next(m.weight for m in model.modules() if m.__dict__.get(operands.ATTRIBUTE) and operands.kept_by([m]))


def optimizer_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def fused_step(model: nn.Module) -> None:
    """Of a training: on a GPU, autograd may not count what fused optimizers write."""
    called(model).float().square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.01, fused=True).step()


def scaled(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value * 0.5 if value.is_floating_point() else value for name, value in model.state_dict().items()}


def assign(model: nn.Module) -> None:
    model.load_state_dict(scaled(model), assign=True)


@torch.no_grad()
def copy_in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(0.5 * parameter)


@torch.inference_mode()
def in_inference_mode(model: nn.Module) -> None:
    first_weight(model).mul_(-0.5)


def foreach(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.5)


def statistics(model: nn.Module) -> None:
    """Only batch norms have any; where there are none, a parameter changes."""
    with torch.no_grad():
        for tensor in list(model.buffers()) or [first_weight(model)]:
            tensor.add_(1)


def replace(model: nn.Module) -> None:
    layer = next(m for m in model.modules() if type(m) in operands.LAYERS)
    layer.weight = nn.Parameter(-0.5 * layer.weight.detach())


def merge_adapter(model: nn.Module) -> None:
    """As peft merges and removes an adapter: through `.data`."""
    names = [name for name, module in model.named_modules() if type(module) in operands.LAYERS]
    targets = [name for name in names if getattr(model.get_submodule(name), "groups", 1) == 1]
    config = LoraConfig(target_modules=targets, init_lora_weights=False, r=2)
    inject_adapter_in_model(config, model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "optimizer step": optimizer_step,
    "fused step": fused_step,
    "load_state_dict": lambda model: model.load_state_dict(scaled(model)),
    "load_state_dict, assign": assign,
    "half": lambda model: model.bfloat16() if isinstance(model, UViT) else model.half(),
    "copy_": copy_in_place,
    "in inference mode": in_inference_mode,
    "foreach": foreach,
    "statistics": statistics,
    "another parameter": replace,
    "merged adapter": merge_adapter,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_noticed(change, model):
    before = result(model)
    CHANGES[change](model)
    expected = expected_of(model)
    assert change == "half" or not torch.equal(expected, before)
    assert torch.equal(result(model), expected)


@pytest.mark.parametrize("precision", ["exact", "fp8"])
def test_a_bias_that_is_removed_is_noticed(precision):
    model = new_model("uvit")
    mlp = model.mid_block.mlp
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.ones_(layer.bias)
    dcae_fast.patch(model, precision=precision, frozen=True)
    before = result(model)
    mlp.fc1.bias = mlp.fc2.bias = None
    expected = result(copy.deepcopy(model))
    assert not torch.equal(expected, before)
    assert torch.equal(result(model), expected)


def test_to_and_load_state_dict_drop_what_is_kept(model):
    for drop in (lambda: model.to(DEVICE), lambda: model.load_state_dict(model.state_dict())):
        result(model)
        assert kept(model)
        drop()
        assert kept(model) == []


def test_writes_through_data_are_not_noticed_until_the_next_patch(model):
    before = result(model)
    first_weight(model).data.mul_(-2)
    expected = expected_of(model)
    assert torch.equal(result(model), before) and not torch.equal(before, expected)
    dcae_fast.patch(model, frozen=True)
    assert torch.equal(result(model), expected)


def test_training_reads_the_weights(model):
    """In training the weights are read as they are, also when they were written to through `.data`."""
    first_weight(model).data.mul_(-2)
    other = copy.deepcopy(model)
    dcae_fast.patch(other)
    for each in (model, other):
        called(each).float().square().sum().backward()
    assert not kept(model)
    for parameter, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected.grad)


@duplicates
def test_copies_are_frozen_and_keep_nothing_of_the_original(duplicate, model):
    before = {id(tensor) for tensor in kept(model)}
    other = duplicate(model)
    assert operands.kept_by(other.modules()) == []
    copy_in_place(other)
    expected = expected_of(other)
    assert torch.equal(result(other), expected)
    assert kept(other) and before.isdisjoint(map(id, kept(other)))
    assert torch.equal(result(model), expected_of(model))


def test_a_moving_average(model):
    average = AveragedModel(model, avg_fn=lambda average, value, _: average.lerp(value, 0.5))
    average.update_parameters(model)
    result(average.module)
    copy_in_place(model)
    average.update_parameters(model)
    assert torch.equal(result(average.module), expected_of(average.module))


def test_no_part_of_the_state(model):
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    assert set(model.state_dict()) <= set(names)
    assert sum(map(len, map(pickle.dumps, kept(model)))) > 0
    with_operands = len(pickle.dumps(model))
    dcae_fast.patch(model, frozen=True)
    assert len(pickle.dumps(model)) == with_operands


def test_unpatch_and_another_patch_drop_everything(model):
    dcae_fast.patch(model)
    assert kept(model) is None
    dcae_fast.patch(model, frozen=True)
    result(model)
    assert kept(model)
    dcae_fast.unpatch(model)
    assert kept(model) is None and not any(operands.ATTRIBUTE in vars(module) for module in model.modules())


def test_a_scope_gives_back_what_was_kept(model):
    before = list(map(id, kept(model)))
    with dcae_fast.patched(model):
        result(model)
        assert kept(model) is None
    assert list(map(id, kept(model))) == before
    other = new_model("ResBlock-batch")
    with dcae_fast.patched(other, frozen=True):
        result(other)
        assert kept(other)
    assert kept(other) is None


@torch.no_grad()
@pytest.mark.parametrize("change", ["copy_", "load_state_dict, assign", "half", "to itself"])
def test_graphs_that_were_captured_before(change, tape):
    model = build("adaptive").bfloat16()
    dcae_fast.patch(model, cuda_graphs=True, frozen=True)
    encoder, x = model.encoder, image(1, 3, 8, 8).bfloat16()
    assert [counts(encoder, x) for _ in range(3)] == [SEEN, CAPTURED, REPLAYED]
    (CHANGES | {"to itself": lambda model: model.to(DEVICE)})[change](model)
    x = x.to(next(model.parameters()).dtype)
    other = copy.deepcopy(encoder)
    dcae_fast.patch(other)
    expected = other(x)
    assert counts(encoder, x) in (SEEN, (0, 1)) and torch.equal(encoder(x), expected)


def test_weights_of_inference_mode_are_read_in_every_call():
    with torch.inference_mode():
        model = new_model("ResBlock-batch")
        dcae_fast.patch(model, frozen=True)
        result(model)
        assert not kept(model)
        first = next(m.weight for m in model.modules() if type(m) is nn.Conv2d)
        first.mul_(2)
        assert torch.equal(result(model), expected_of(model))


def test_errors():
    with pytest.raises(TypeError, match="frozen='yes'"):
        dcae_fast.patch(new_model("uvit"), frozen="yes")
    model = new_model("uvit")
    model.__class__ = type("FSDPUViT", (FSDPModule, type(model)), {})
    with pytest.raises(ValueError, match="frozen=True: FSDP"):
        dcae_fast.patch(model, frozen=True)
