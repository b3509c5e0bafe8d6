"""Changes inside a patched block have the same effect as without patch.

The changes are hooks, replaced forwards, replaced modules and new weights.
"""

import copy

import pytest
import torch
from small_models import BLOCKS, DEVICE, build_block, image, operators_called, step
from torch import nn
from torch.nn.utils import parametrizations

import dcae_fast
from dcae_fast.models import blocks


@pytest.fixture(params=BLOCKS)
def block_and_input(request) -> tuple[nn.Module, torch.Tensor]:
    return build_block(request.param)


def forward_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 1.5 * output)


def forward_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, dx, dy: (None if dx[0] is None else 1.5 * dx[0],))


def backward_pre_hook(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda module, dy: (1.5 * dy[0],))


def own_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: original(x).sin()


@torch.no_grad()
def output(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"output": block(x)}


FORWARD, BACKWARD = [forward_hook, forward_pre_hook, own_forward], [backward_hook, backward_pre_hook]
LARGE = 16  # modules; larger blocks are slow: each of their modules gets one forward and one backward change


@pytest.mark.parametrize("interfere", [*FORWARD, *BACKWARD], ids=lambda function: function.__name__)
def test_interference_with_any_module(block_and_input, interfere, same_step):
    block, x = block_and_input
    kinds, result = (FORWARD, output) if interfere in FORWARD else (BACKWARD, step)
    untouched = result(block, x)
    paths = [path for path, module in block.named_modules() if not isinstance(module, nn.ModuleList)]
    for path in paths[kinds.index(interfere) :: len(kinds)] if len(paths) > LARGE else paths:
        eager, fast = copy.deepcopy(block), copy.deepcopy(block)
        dcae_fast.patch(fast)
        interfere(eager.get_submodule(path))
        interfere(fast.get_submodule(path))
        expected = result(eager, x)
        assert any(not torch.equal(expected[name], untouched[name]) for name in expected), f"{path}: no effect"
        same_step(result(fast, x), expected, path)


class RMSNorm2d(nn.Module):
    """Has the name of a known class but computes something else."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))

    def forward(self, x):
        return (x * self.weight[:, None, None] + self.bias[:, None, None]).tanh()


ACTS = [nn.GELU(), nn.LeakyReLU(0.5), nn.Sequential(nn.Tanh())]
NORMS = [nn.GroupNorm(2, 16), nn.Identity(), nn.InstanceNorm2d(16), nn.BatchNorm2d(16, affine=False), RMSNorm2d(16)]
REPLACEMENTS = [
    *[("ResBlock", "main.conv1.act", act) for act in ACTS],
    *[("ResBlock", "main.conv2.norm", norm) for norm in NORMS],
    ("ResBlock", "main.conv2.norm", nn.BatchNorm2d(16, track_running_stats=False)),
    ("ResBlock", "main.conv2.norm", blocks.RMSNorm2d(16, eps=0.1)),
    ("ResBlock", "main.conv1", nn.Conv2d(16, 16, 3, padding=1)),
    ("ResBlock", "main.conv2", nn.Identity()),
    ("ResBlock", "main.conv1.conv", nn.Conv2d(16, 16, 3, padding="same", padding_mode="circular")),
    ("ResBlock", "main.conv1.conv", nn.Sequential(nn.Conv2d(16, 16, 1), nn.Tanh())),
    ("ResBlock", "main", nn.Conv2d(16, 16, 1)),
    ("ResBlock", "shortcut", nn.Conv2d(16, 16, 1)),
    ("EfficientViTBlock", "local_module.main.glu_act", nn.GELU()),
    ("EfficientViTBlock", "local_module.main.depth_conv", nn.Conv2d(32, 32, 1)),
    ("EfficientViTBlock", "local_module.main.depth_conv.act", nn.Tanh()),
    (
        "EfficientViTBlock",
        "local_module.main.depth_conv.conv",
        nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32),
    ),
    (
        "EfficientViTBlock",
        "local_module.main.depth_conv.conv",
        nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False),
    ),
    ("EfficientViTBlock", "local_module.main.point_conv.norm", nn.GroupNorm(4, 16)),
    ("EfficientViTBlock", "context_module.main.proj", nn.Conv2d(32, 16, 1)),
    ("EfficientViTBlock", "context_module.main.aggreg.0", nn.Identity()),
    ("EfficientViTBlock", "context_module.main.qkv.act", nn.Tanh()),
    ("EfficientViTBlock", "context_module.main", blocks.LiteMLA(16, 16, norm_qk=True)),
    ("down-pixel", "main.conv.act", nn.SiLU()),
    ("down-pixel", "main.conv", nn.Conv2d(8, 4, 1)),
    ("down-conv", "main", nn.Conv2d(8, 16, 2, stride=2)),
    ("up-pixel", "main.conv", nn.Conv2d(16, 32, 1)),
    ("up-pixel", "main", blocks.InterpolateConvUpSampleLayer(16, 8)),
    ("head", "op_list.0", nn.GroupNorm(2, 8)),
    ("head", "op_list.1", nn.GELU()),
    *[("diffusers-ResBlock", "nonlinearity", act) for act in ACTS],
    ("diffusers-ResBlock", "norm", nn.LayerNorm(8)),
    ("diffusers-ResBlock", "norm", nn.Identity()),
    ("diffusers-ResBlock-batch", "norm", nn.GroupNorm(2, 8)),
    ("diffusers-EfficientViTBlock", "attn.nonlinearity", nn.Softplus()),
    ("diffusers-EfficientViTBlock", "attn.norm_out", nn.LayerNorm(16)),
    ("diffusers-EfficientViTBlock", "attn.to_qkv_multiscale.0", nn.Identity()),
    ("diffusers-EfficientViTBlock", "attn.to_k", nn.Sequential(nn.Linear(16, 16), nn.Tanh())),
    ("diffusers-EfficientViTBlock", "conv_out.nonlinearity", nn.GELU()),
    ("diffusers-EfficientViTBlock", "conv_out.norm", nn.LayerNorm(16)),
    ("diffusers-EfficientViTBlock", "conv_out.conv_depth", nn.Conv2d(32, 32, 1)),
    ("diffusers-decoder", "norm_out", nn.LayerNorm(8)),
    ("diffusers-decoder", "conv_act", nn.GELU()),
]


@pytest.mark.parametrize("name, path, new", REPLACEMENTS, ids=lambda value: str(value).split("(")[0])
@pytest.mark.parametrize("patch_first", [False, True], ids=["replace-patch", "patch-replace"])
def test_replaced_modules(name, path, new, patch_first, same_step):
    block, x = build_block(name)
    fast = copy.deepcopy(block)
    if patch_first:
        dcae_fast.patch(fast)
    for model in (block, fast):
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, copy.deepcopy(new).to(DEVICE))
    dcae_fast.patch(fast)
    same_step(step(fast, x), step(block, x))


def test_reparametrised_weights(same_step):
    """torch.nn.utils.parametrizations changes the classes of modules. This can happen before or after `patch`."""
    block, x = build_block("ResBlock")
    for conv in (block.main.conv1.conv, block.main.conv2.conv):
        parametrizations.weight_norm(conv)
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    for model in (block, fast):
        parametrizations.weight_norm(model.main.conv2.norm, dim=None)
    same_step(step(fast, x), step(block, x))


def optimizer_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().sin()
    optimizer.step()


def load(model: nn.Module, assign: bool) -> None:
    model.load_state_dict({name: 0.5 * tensor for name, tensor in model.state_dict().items()}, assign=assign)


CHANGES = {
    "edited in place": lambda model: [parameter.data.mul_(1.5) for parameter in model.parameters()],
    "loaded": lambda model: load(model, assign=False),
    "assigned": lambda model: load(model, assign=True),
    "optimizer": optimizer_step,
    "running statistics": lambda model: [buffer.add_(1) for buffer in model.buffers()],
    "half and back": lambda model: model.half().float(),
    "cast": lambda model: model.double(),
    "replaced": lambda model: [
        setattr(module, name, nn.Parameter(2 * parameter.detach()))
        for module in model.modules()
        for name, parameter in list(module.named_parameters(recurse=False))
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["ResBlock-batch", "EfficientViTBlock", "diffusers-ResBlock-batch"])
def test_changed_weights_are_seen(name, change, same_step):
    block, x = build_block(name)
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    step(fast, x)
    for model in (block, fast):
        change(model)
    x = x.to(next(block.parameters()).dtype)
    same_step(step(fast, x), step(block, x))


@pytest.mark.parametrize("name", ["ResBlock-batch", "diffusers-ResBlock-batch"])
def test_between_training_and_evaluation(name, same_step):
    block, _ = build_block(name)
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    for seed, training in enumerate([True, True, False, True, False]):
        x = image(2, next(block.parameters()).shape[1], 2, 4, seed=seed)
        same_step(step(fast.train(training), x), step(block.train(training), x), f"step {seed}")


def test_frozen_weights(same_step):
    block, x = build_block("EfficientViTBlock")
    block.requires_grad_(False).local_module.main.depth_conv.conv.weight.requires_grad_()
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)
    assert operators_called(step, fast, x)["depthwise_glu_backward"] == 1
    same_step(step(fast, x), step(block, x))
