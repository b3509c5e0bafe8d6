"""Modules that `patch` skips. The report counts the modules with a fast forward and gives a reason for all others."""

from collections import Counter

import pytest
import torch
from small_models import MODELS, build, build_block, diffusers_block, image, reconstruct, step
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import dcae_fast
from dcae_fast.fast.call import Coder, Network
from dcae_fast.fast.module import FastModule, is_fast
from dcae_fast.models import UViT, UViTConfig, blocks
from dcae_fast.models.dit import DiTBlock


def reasons(model: nn.Module) -> dict[str, str]:
    return {name: reason for _, name, reason in dcae_fast.patch(model).skipped}


@pytest.fixture
def eager_calls(monkeypatch) -> list[FastModule]:
    """Patched modules that ran their original forward, except coders and networks, which only contain other modules."""
    calls, eager = [], FastModule.eager

    def record(module, *args, **kwargs):
        if not isinstance(module, Coder | Network):
            calls.append(module)
        return eager(module, *args, **kwargs)

    monkeypatch.setattr(FastModule, "eager", record)
    return calls


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_counted_takes_its_fast_forward(name, eager_calls):
    model = build(name)
    assert dcae_fast.patch(model).replaced
    reconstruct(model, image(1, 3, 8, 4))
    assert not eager_calls


def change(path: str, value):
    """A function that sets an attribute at a path inside a block."""

    def apply(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, value)

    return apply


LEFT = [
    ("ResBlock", change("main.conv1.act", nn.GELU()), "ConvLayer", "its activation is GELU"),
    ("ResBlock", change("main.conv1.act", nn.Hardswish()), "ConvLayer", "its activation is Hardswish"),
    ("ResBlock", change("main.conv1.dropout", nn.Dropout2d(0.1)), "ConvLayer", "it has dropout"),
    ("ResBlock", change("main.conv2.norm", nn.GroupNorm(2, 16)), "ConvLayer", "its norm is GroupNorm"),
    ("ResBlock", change("main.conv2.norm", nn.GroupNorm(2, 16)), "ResBlock", "conv2: its norm is GroupNorm"),
    ("ResBlock", change("main.conv2", nn.Conv2d(16, 16, 1)), "ResBlock", "conv2: no fast forward for Conv2d"),
    ("ResBlock", change("main", nn.Conv2d(16, 16, 1)), "ResidualBlock", "main: no fast forward for Conv2d"),
    ("ResBlock", change("shortcut", nn.Conv2d(16, 16, 1)), "ResidualBlock", "its shortcut is Conv2d"),
    ("ResBlock", change("pre_norm", nn.GroupNorm(2, 16)), "ResidualBlock", "it has a norm before the branch"),
    ("ResBlock", change("shortcut", None), "ResidualBlock", "it has one branch"),
    (
        "ResBlock",
        change("main.conv2.norm", nn.BatchNorm2d(16, affine=False)),
        "ConvLayer",
        "its norm has no weight or no bias",
    ),
    ("EfficientViTBlock", change("context_module.main.norm_qk", True), "LiteMLA", "norms of queries and keys"),
    ("EfficientViTBlock", change("context_module.main.kernel_func", nn.GELU()), "LiteMLA", "kernel function is GELU"),
    ("up-interpolate", change("main.mode", "bilinear"), "InterpolateConvUpSampleLayer", "enlarges 2 times, bilinear"),
    ("diffusers-ResBlock", change("nonlinearity", nn.GELU()), "ResBlock", "its activation is GELU"),
    ("diffusers-EfficientViTBlock", change("conv_out.norm", None), "GLUMBConv", "it has no norm"),
    (
        "diffusers-EfficientViTBlock",
        change("attn.nonlinearity", nn.GELU()),
        "SanaMultiscaleLinearAttention",
        "its kernel function is GELU",
    ),
    ("diffusers-down", lambda block: (change("downsample", False)(block), change("shortcut", False)(block)),
     "DCDownBlock2d", "it is a convolution and nothing else"),
]  # fmt: skip


@pytest.mark.parametrize("block, change, name, reason", LEFT, ids=[f"{name}-{reason}" for _, _, name, reason in LEFT])
def test_what_can_never_be_fast_is_left_alone(block, change, name, reason):
    block, _ = build_block(block)
    change(block)
    found = [(cls, why) for _, cls, why in dcae_fast.patch(block).skipped]
    assert any(cls == name and reason in why for cls, why in found), found


def test_gated_convolutions_without_norm():
    """GLUMBConv has no norm in diffusers' SANA transformer."""
    block = diffusers_block("GLUMBConv", 8, 8, norm_type=None)
    assert not reasons(block)


def test_transformer_blocks():
    sizes = {"in_channels": 4, "input_size": 4, "depth": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    network = UViT(UViTConfig(**sizes))
    assert not reasons(network)
    network.mid_block.mlp.act = nn.SiLU()
    network.in_blocks[0].norm1 = nn.LayerNorm(16, elementwise_affine=False)
    report = dcae_fast.patch(network)
    assert set(report.skipped) == {
        ("mid_block", "Block", "its activation is SiLU"),
        ("in_blocks.0", "Block", "a norm has no weight or no bias"),
    }
    assert report.replaced["Block"] == 1 and not is_fast(network.mid_block)
    block = DiTBlock(16, 2)
    block.post_norm = True
    assert "post_norm" in reasons(block)["DiTBlock"]
    block.post_norm, block.attn.q_norm = False, nn.LayerNorm(8)
    assert "additional" in reasons(block)["DiTBlock"]
    block.attn.q_norm = nn.Identity()
    assert not reasons(block)


@pytest.mark.parametrize("package", ["dc_gen.c2icore.diffusioncore.models", "efficientvit.diffusioncore.models"])
def test_networks_of_the_original(package):
    """Blocks of original networks are patched. The report gives a reason why the whole network is not."""
    sizes = {"in_channels": 4, "input_size": 4, "depth": 2, "hidden_size": 16, "num_heads": 2, "num_classes": 3}
    network = UViT(UViTConfig(**sizes))
    for module in network.modules():
        if type(module).__module__ == "dcae_fast.models.uvit":
            cls = type(module)
            module.__class__ = type(cls.__name__, (cls,), {"__module__": f"{package}.uvit"})
    report = dcae_fast.patch(network, cuda_graphs=True)
    assert report.replaced == {"Block": 3, "PatchEmbed": 1}
    assert [(path, name) for path, name, _ in report.skipped] == [("", "UViT")]
    assert "cuda_graphs" in report.skipped[0][2] and "fast_options" not in vars(network)


class Quantised(torch.Tensor):
    """Stand-in for weights of a tensor subclass."""


@pytest.mark.parametrize("name", ["ResBlock", "diffusers-ResBlock"])
def test_weights_that_are_no_ordinary_tensors(name):
    block, _ = build_block(name)
    conv = next(module for module in block.modules() if isinstance(module, nn.Conv2d))
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Quantised), requires_grad=False)
    assert "it has weights of type Quantised" in reasons(block).values()


def test_blocks_in_a_model_of_another_kind():
    """Modules of other models do not pass on channels-last tensors, so coder blocks among them are skipped.

    A block passed to `patch` directly or in a container is treated as part of a coder.
    """

    class Backbone(nn.Module):
        def __init__(self, *stages: nn.Module):
            super().__init__()
            self.stages = nn.ModuleList(stages)

    block, _ = build_block("ResBlock")
    report = dcae_fast.patch(Backbone(block))
    assert not report.replaced and not any(map(is_fast, block.modules()))
    assert set(report.skipped) >= {("stages.0", "ResidualBlock", "it lies outside the encoder or decoder of a DC-AE")}
    assert dcae_fast.patch(block).replaced["ResidualBlock"] == 1
    for container in (nn.Sequential(block), nn.ModuleList([block]), nn.parallel.DataParallel(block)):
        dcae_fast.unpatch(block)
        assert dcae_fast.patch(container).replaced["ResidualBlock"] == 1
    decoder = build("strided").decoder
    report = dcae_fast.patch(decoder)
    assert dcae_fast.patch(Backbone(decoder)).replaced == report.replaced
    dcae_fast.unpatch(decoder)
    decoder.__class__ = type("OtherDecoder", (type(decoder),), {})
    assert dcae_fast.patch(Backbone(decoder)).replaced == report.replaced - Counter(Decoder=1), (
        "its blocks are as before"
    )


def test_a_reason_goes_with_its_cause(same_step):
    block, x = build_block("ResBlock")
    expected = step(block, x)
    act = block.main.conv1.act
    block.main.conv1.act = nn.GELU()
    assert reasons(block) == {"ConvLayer": "its activation is GELU"}
    block.main.conv1.act = act
    assert not reasons(block) and is_fast(block.main.conv1)
    same_step(step(block, x), expected)


# Classes that other libraries derive from patched classes.


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def norm_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, blocks.RMSNorm2d))


def test_a_parametrised_module(same_step):
    """A parametrised module stays patched until the next `patch` or `unpatch`. Both keep the parametrisation."""
    block, x = build_block("ResBlock")
    dcae_fast.patch(block)
    norm = norm_of(block)
    parametrize.register_parametrization(norm, "weight", Double())
    assert is_fast(norm)
    expected = step(block, x)
    assert reasons(block)["RMSNorm2d"] == "parametrised: weight"
    assert (
        not is_fast(norm) and parametrize.is_parametrized(norm, "weight") and type(norm).__name__.endswith("RMSNorm2d")
    )
    same_step(step(block, x), expected)
    dcae_fast.unpatch(block)
    assert not any(map(is_fast, block.modules()))
    same_step(step(block, x), expected)
    parametrize.remove_parametrizations(norm, "weight", leave_parametrized=True)
    assert type(norm) is blocks.RMSNorm2d
    assert not reasons(block) and is_fast(norm)


@pytest.mark.parametrize("leave", [dcae_fast.unpatch, lambda block: None], ids=["unpatch", "patched"])
def test_removing_a_parametrisation(leave):
    block, x = build_block("ResBlock")
    dcae_fast.patch(block)
    norm = norm_of(block)
    parametrizations.weight_norm(norm, dim=None)
    leave(block)
    parametrize.remove_parametrizations(norm, "weight")
    dcae_fast.unpatch(block)
    assert type(norm) is blocks.RMSNorm2d


def test_patched_around_a_parametrisation():
    """A module parametrised inside `patched` is still parametrised afterwards."""
    block, _ = build_block("ResBlock")
    norm = norm_of(block)
    with dcae_fast.patched(block):
        parametrize.register_parametrization(norm, "weight", Double())
    assert parametrize.is_parametrized(norm) and not any(map(is_fast, block.modules()))


def test_a_class_that_another_library_derived():
    block, x = build_block("ResBlock")
    expected = block(x)
    dcae_fast.patch(block)
    mixed_in = type("Watching", (), {"watched": True})
    cls = type(block.main)
    block.main.__class__ = type("Watched" + cls.__name__, (mixed_in, cls), {"label": 3})
    assert not reasons(block) and is_fast(block.main) and block.main.label == 3
    dcae_fast.unpatch(block)
    assert type(block.main).__name__ == "WatchedResBlock" and type(block.main).__mro__[1:3] == (
        mixed_in,
        blocks.ResBlock,
    )
    assert block.main.label == 3 and block.main.watched and not any(map(is_fast, block.modules()))
    torch.testing.assert_close(block(x), expected)


def test_a_derived_class_that_calls_super():
    """`unpatch` raises an error: super() in the derived class would still refer to the patched class."""
    block, _ = build_block("ResBlock")
    dcae_fast.patch(block)
    patched = type(block.main)

    class Debugged(patched):
        def forward(self, x):
            return super().forward(x)

    block.main.__class__ = Debugged
    with pytest.raises(RuntimeError, match="Debugged is derived from the class that `patch` made of ResBlock"):
        dcae_fast.unpatch(block)
    block.main.__class__ = patched
    dcae_fast.unpatch(block)
    assert not any(map(is_fast, block.modules()))
