"""Transformers that train in 8 bit: which operators compute, gradients, layers that stay exact, frozen networks."""

import copy

import pytest
import torch
from torch import nn

import dcae_fast
from dcae_fast.models.dit import DiT, DiTConfig
from dcae_fast.models.uvit import UViT, UViTConfig
from dcae_fast.ops import linear_fp8, norm_attention_fp8, norm_mlp_fp8
from dcae_fast.ops._library import INTERPRETED, Kernels

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the references compute in the interpreter only")
SIZES = {"in_channels": 16, "input_size": 4, "depth": 2, "hidden_size": 128, "num_classes": 10}
FUSED, WIDE = 2, 4  # heads of 64 channels, which packed_attention takes, and of 32
FP8 = {op.__name__: op for op in (linear_fp8, norm_attention_fp8, norm_mlp_fp8)}


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> dict[str, list[bool]]:
    """The calls of the operators that train in 8 bit: name → `everything` of each. They compute by references."""
    monkeypatch.setattr(Kernels, "_choose", lambda self, args: self.plain)
    found = {}

    def recorded(name):
        def call(*args, **kwargs):
            found.setdefault(name, []).append(args[-1])
            return FP8[name](*args, **kwargs)

        return call

    for name in FP8:
        monkeypatch.setattr(dcae_fast.ops, name, recorded(name))
    return found


def build(kind: str, heads: int = FUSED) -> nn.Module:
    torch.manual_seed(0)
    config = {"uvit": UViTConfig, "dit": DiTConfig}[kind](**SIZES, num_heads=heads, class_dropout_prob=0.0)
    network = {"uvit": UViT, "dit": DiT}[kind](config)
    for parameter in network.parameters():  # DiT's last layers are zeros
        parameter.data.add_(torch.randn_like(parameter), alpha=0.03)
    return network.train()


def gradients(network: nn.Module, half: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 16, 4, 4, generator=generator)
    t, y = 1000 * torch.rand(4, generator=generator), torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = (network(x, t, y)[:, :16].float() + x).square().mean()
    network.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}


def error(got: dict, exact: dict) -> float:
    assert got.keys() == exact.keys() and not any(gradient is None for gradient in got.values())
    squares = sum((got[name] - exact[name]).double().square().sum() for name in exact)
    return (squares / sum(gradient.double().square().sum() for gradient in exact.values())).sqrt().item()


@pytest.mark.parametrize("precision", ["fp8", "fp8-all"])
@pytest.mark.parametrize("heads", [FUSED, WIDE])
@pytest.mark.parametrize("kind", ["uvit", "dit"])
def test_gradients(kind, heads, precision, calls):
    network = build(kind, heads)
    exact, half = gradients(network, half=False), gradients(network)
    dcae_fast.patch(network, precision=precision)
    got = gradients(network)
    assert 1.2 * error(half, exact) < error(got, exact) < 0.1
    blocks = 3 if kind == "uvit" else 2
    expected = {"norm_mlp_fp8": blocks}
    expected |= {"norm_attention_fp8": blocks} if heads == FUSED else {"linear_fp8": 2 * blocks}
    if kind == "uvit":
        expected["linear_fp8"] = expected.get("linear_fp8", 0) + 1  # the long skip
    assert {name: len(found) for name, found in calls.items()} == expected
    assert {everything for found in calls.values() for everything in found} == {precision == "fp8-all"}
    dcae_fast.unpatch(network)
    plain = gradients(network)
    assert all(torch.equal(plain[name], half[name]) for name in half)


@pytest.mark.parametrize("keep, expected", [(["fc2"], 1), (["qkv", "fc1"], 2)], ids=str)
def test_layers_that_stay_exact(keep, expected, calls):
    """The other layer of a half is computed by itself."""
    network = build("dit")
    exact, half = gradients(network, half=False), gradients(network)
    dcae_fast.patch(network, precision="fp8", keep=keep)
    got = gradients(network)
    assert len(calls["linear_fp8"]) == expected * 2 and "norm_mlp_fp8" not in calls
    assert ("norm_attention_fp8" in calls) == ("qkv" not in keep)
    assert error(half, exact) < error(got, exact) < 0.1


def test_frozen_networks_train(calls):
    """A frozen network drops what it keeps when it trains; 8-bit weights of new values follow."""
    network = build("uvit")
    dcae_fast.patch(network, precision="fp8", frozen=True)
    x, t, y = torch.randn(2, 16, 4, 4), torch.rand(2), torch.tensor([0, 1])

    @torch.no_grad()
    def infer(network):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x, t, y)

    before = infer(network)
    gradients(network)
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    fresh = copy.deepcopy(network)
    dcae_fast.patch(fresh, precision="fp8", frozen=True)
    after = infer(network)
    assert torch.equal(after, infer(fresh)) and not torch.equal(after, before)


def test_hooks_and_trained_parts(calls):
    """A layer with a hook is called; gradients of frozen parameters are not computed."""
    network = build("dit")
    dcae_fast.patch(network, precision="fp8-all")
    seen = []
    network.blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("fc2" in name or "qkv.bias" in name)
    exact = gradients(copy.deepcopy(network), half=False)
    found = gradients(network)
    assert seen and found.keys() == exact.keys() and error(found, exact) < 0.1
    assert len(calls["norm_mlp_fp8"]) == 1
