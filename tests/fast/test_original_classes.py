"""Patches original DC-Gen and efficientvit classes. Stand-ins have their qualified names, attributes and results."""

import copy
import pickle
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from small_models import build, build_block, image, operators_called, step
from torch import nn

import dcae_fast
from dcae_fast.fast import names
from dcae_fast.fast.bands import Bands
from dcae_fast.models import autoencoder, blocks, functional

CODERS = {"dc_gen": "dc_gen.aecore.models.dc_ae", "efficientvit": "efficientvit.models.efficientvit.dc_ae"}


ATTRIBUTES = {
    blocks.ConvLayer: {"dropout": None},
    blocks.LiteMLA: {"kernel_func": nn.ReLU(), "norm_qk": False},
    blocks.ResidualBlock: {"pre_norm": None, "post_act": None},
}


class Norm(nn.LayerNorm):
    def forward(self, x):
        return functional.rms_norm(x, self.weight, self.bias, self.eps)


class ConvLayer(blocks.ConvLayer):
    def forward(self, x):
        return blocks.ConvLayer.forward(self, x if self.dropout is None else self.dropout(x))


class LiteMLA(blocks.LiteMLA):
    def forward(self, x):
        y = blocks.LiteMLA.forward(self, x)
        return y if isinstance(self.kernel_func, nn.ReLU) and not self.norm_qk else y.sin()  # a different result


class ResidualBlock(blocks.ResidualBlock):
    def forward(self, x):
        y = self.main(x if self.pre_norm is None else self.pre_norm(x)) + self.shortcut(x)
        return y if self.post_act is None else self.post_act(y)


def stand_ins(root: str, coders: str) -> dict[type, tuple[str, str, type]]:
    """This project's class → (module of the original class, name of the original class, base class of the stand-in).

    coders: the module of encoder and decoder.
    """
    efficientvit = "efficientvit" in coders.removeprefix(root)
    duplicating = "ChannelDuplicatingPixelUnshuffle" if efficientvit else "ChannelDuplicatingPixelShuffle"
    ops = f"{root}.models.nn.ops"
    same_name = [
        blocks.ResBlock,
        blocks.GLUMBConv,
        blocks.EfficientViTBlock,
        blocks.OpSequential,
        blocks.ConvPixelUnshuffleDownSampleLayer,
        blocks.ConvPixelShuffleUpSampleLayer,
        blocks.InterpolateConvUpSampleLayer,
        blocks.PixelUnshuffleChannelAveragingDownSampleLayer,
    ]
    return {
        **{cls: (ops, cls.__name__, cls) for cls in same_name},
        blocks.ConvLayer: (ops, "ConvLayer", ConvLayer),
        blocks.LiteMLA: (ops, "LiteMLA", LiteMLA),
        blocks.ResidualBlock: (ops, "ResidualBlock", ResidualBlock),
        blocks.ChannelDuplicatingPixelShuffleUpSampleLayer: (
            ops, duplicating + "UpSampleLayer", blocks.ChannelDuplicatingPixelShuffleUpSampleLayer
        ),
        nn.Identity: (ops, "IdentityLayer", nn.Identity),
        blocks.RMSNorm2d: (f"{root}.models.nn.norm", "TritonRMSNorm2d", Norm),
        autoencoder.Encoder: (coders, "Encoder", autoencoder.Encoder),
        autoencoder.Decoder: (coders, "Decoder", autoencoder.Decoder),
        autoencoder.DCAE: (coders, "DCAE", autoencoder.DCAE),
    }  # fmt: skip


@pytest.fixture(params=CODERS)
def as_original(request, monkeypatch):
    """as_original(model): a copy that uses stand-ins of the original classes. They can be imported during the test."""
    return converter(request.param, CODERS[request.param], monkeypatch)


def converter(root: str, coders: str, monkeypatch) -> Callable[[nn.Module], nn.Module]:
    classes = {}
    for ours, (module, name, base) in stand_ins(root, coders).items():
        classes[ours] = type(name, (base,), {"__module__": module})
        parts = module.split(".")
        for package in [".".join(parts[: i + 1]) for i in range(len(parts))]:
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        setattr(sys.modules[module], name, classes[ours])

    def convert(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        for module in list(model.modules()):
            for name, value in ATTRIBUTES.get(type(module), {}).items():
                setattr(module, name, value)
            for name, child in module.named_children():
                if type(child) is blocks.RMSNorm2d:
                    norm = classes[blocks.RMSNorm2d](child.weight.shape, child.eps).to(child.weight.device)
                    norm.load_state_dict(child.state_dict())
                    module.register_module(name, norm)
            module.__class__ = classes.get(type(module), type(module))
        return model

    return convert


@pytest.mark.parametrize("name", ["strided", "shuffled"])
def test_step(name, as_original, same_step):
    ours = build(name)
    original, x = as_original(ours), image(1, 3, 8, 8)
    assert {type(module).__module__.split(".")[0] for module in original.modules()} <= {"torch", *CODERS}
    expected = step(original, x)
    report, names = dcae_fast.patch(original), {"RMSNorm2d": "TritonRMSNorm2d"}
    assert report.replaced == {names.get(key, key): n for key, n in dcae_fast.patch(ours).replaced.items()}
    assert report.skipped == []
    same_step(step(original, x), expected)
    with torch.no_grad():
        assert operators_called(original, x) == operators_called(ours, x)


@pytest.mark.parametrize("name", ["strided", "shuffled"])
@torch.no_grad()
def test_bounded_memory(name, as_original, compare):
    model, x = as_original(build(name).double()), image(1, 3, 128, 8).double()
    latent = model.encoder(x)
    expected = model.decoder(latent)
    dcae_fast.patch(model, max_memory=1)
    for coder, value, want in ((model.encoder, x, latent), (model.decoder, latent, expected)):
        assert any(isinstance(step, Bands) for step in coder.plan(value).steps)
        compare("whole", coder(value), want, 1e-12)


def test_copies_and_back(as_original):
    original, x = as_original(build("adaptive")), image()
    before = [type(module) for module in original.modules()]
    dcae_fast.patch(original)
    twin = pickle.loads(pickle.dumps(original))
    assert [type(m) for m in twin.modules()] == [type(m) for m in original.modules()] != before
    assert torch.equal(twin(x), original(x))
    dcae_fast.unpatch(original)
    assert [type(module) for module in original.modules()] == before


@pytest.mark.parametrize(
    "name, path, attribute, value",
    [
        ("ResBlock", "", "pre_norm", nn.GroupNorm(2, 16)),
        ("ResBlock", "", "post_act", nn.ReLU()),
        ("down-pixel", "", "pre_norm", nn.GroupNorm(2, 8)),
        ("up-pixel", "", "post_act", nn.ReLU()),
        ("ResBlock", "main.conv1", "dropout", nn.Tanh()),
        ("ResBlock", "main.conv2", "dropout", nn.Tanh()),
        ("down-pixel", "main.conv", "dropout", nn.Tanh()),
        ("EfficientViTBlock", "local_module.main.depth_conv", "dropout", nn.Tanh()),
        ("EfficientViTBlock", "context_module.main", "kernel_func", nn.Softplus()),
        ("EfficientViTBlock", "context_module.main", "norm_qk", True),
    ],
)
def test_options_of_no_released_model(name, path, attribute, value, as_original, same_step):
    block, x = build_block(name)
    block = as_original(block)
    without = block(x)
    setattr(block.get_submodule(path), attribute, value)
    expected = step(block.to(x.device), x)
    assert not torch.equal(expected["output"], without)
    dcae_fast.patch(block)
    same_step(step(block, x), expected)


COPIES = {
    "dc_ai": "dc_ai.aecore.models.dc_ae",
    "diffusion.model.dc_ae.efficientvit": "diffusion.model.dc_ae.efficientvit.models.efficientvit.dc_ae",
    "somebody.vendored.dc_gen": "somebody.vendored.dc_gen.aecore.models.dc_ae",
}


@pytest.mark.parametrize("root", COPIES)
def test_copies_in_other_packages(root, monkeypatch, compare):
    ours = build("shuffled")
    model, x = converter(root, COPIES[root], monkeypatch)(ours), image(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        report, known = dcae_fast.patch(model), dcae_fast.patch(ours)
        assert report.replaced.total() == known.replaced.total() and report.skipped == known.skipped == []
        assert operators_called(model, x) == operators_called(ours, x)  # modules between the blocks are recognised, too
        compare("eager", model(x), expected, 5e-6)


def test_a_root_of_ones_own(monkeypatch):
    monkeypatch.setattr(names, "ROOTS", set(names.ROOTS))
    model = converter("group.my_fork", "group.my_fork.aecore.models.dc_ae", monkeypatch)(build("shuffled"))
    report = dcae_fast.patch(model)
    assert not report.replaced
    assert (
        "decoder",
        "Decoder",
        "group.my_fork.aecore.models.dc_ae is no known module of a DC-AE: see dcae_fast.register_root",
    ) in report.skipped
    dcae_fast.register_root("my_fork")
    report = dcae_fast.patch(model)
    assert report.skipped == [] and report.replaced == dcae_fast.patch(model).replaced
    assert report.replaced.total() == dcae_fast.patch(build("shuffled")).replaced.total()


@pytest.mark.parametrize("root, error", [(3, TypeError), (None, TypeError), ("", ValueError), ("my-fork", ValueError)])
def test_what_is_no_root(root, error):
    with pytest.raises(error, match="expected the name of a package, as in 'my_fork'"):
        dcae_fast.register_root(root)


def test_strangers_with_a_known_name(as_original):
    """`patch` also checks attributes: it skips and reports a module with missing or additional attributes."""
    model = as_original(build("shuffled"))
    block = model.encoder.stages[1].op_list[0].main
    block.conv1.attention = nn.Conv2d(8, 8, 1)
    stranger = type("ConvLayer", (nn.Identity,), {"__module__": type(block.conv1).__module__})
    block.conv2 = stranger()
    path = "encoder.stages.1.op_list.0"
    assert set(dcae_fast.patch(model).skipped) == {
        (f"{path}.main.conv1", "ConvLayer", "it also has attention"),
        (f"{path}.main.conv2", "ConvLayer", "it has no conv, norm, act"),
        (f"{path}.main", "ResBlock", "conv2: it has no conv, norm, act"),
        (path, "ResidualBlock", "main: conv2: it has no conv, norm, act"),
    }
    assert type(block.conv2) is stranger


def test_derived_classes(as_original):
    model = as_original(build("shuffled"))
    layer = model.encoder.stages[1].op_list[0].main.conv1
    layer.__class__ = type("QuantConvLayer", (type(layer),), {"__module__": "somebody"})
    assert ("encoder.stages.1.op_list.0.main.conv1", "QuantConvLayer") in {
        (path, name) for path, name, reason in dcae_fast.patch(model).skipped if "derives from ConvLayer" in reason
    }


def test_classes_of_the_same_name_elsewhere():
    """A class is recognised by its name and its module."""
    block, x = build_block("ResBlock")
    for module in block.modules():
        if type(module) is blocks.ConvLayer:
            module.__class__ = type("ConvLayer", (blocks.ConvLayer,), {"__module__": "somebody.models.nn.ops"})
    report = dcae_fast.patch(block)
    assert report.replaced == {"RMSNorm2d": 1}, "all else rests on these layers"
    reason = "somebody.models.nn.ops is no known module of a DC-AE: see dcae_fast.register_root"
    assert ("main.conv2", "ConvLayer", reason) in report.skipped
    assert block(x).shape == x.shape
