"""Every block against the original implementation: outputs, gradients, batch-norm statistics, half precision."""

import pytest
import torch

from dcae_fast.models import blocks, functional
from dcae_fast.models.autoencoder import down_sample, up_sample

LIMIT = 3e-6
NORMS = {"trms2d": "rms", "bn2d": "batch"}
SAMPLERS = {
    "ConvPixelUnshuffle": "pixel", "Conv": "conv", "ConvPixelShuffle": "pixel", "InterpolateConv": "interpolate"
}  # fmt: skip


def build_sampler(m: dict) -> torch.nn.Module:
    build = down_sample if m["kind"] == "down-sample block" else up_sample
    block = build(SAMPLERS[m["type"]], m["in_channels"], m["out_channels"])
    return block if m["shortcut"] else block.main


BUILD = {
    "channel RMS norm": lambda m: blocks.RMSNorm2d(m["channels"], m["eps"]),
    "ResBlock": lambda m: blocks.ResBlock(m["channels"], NORMS[m["norm"]], m["act"]),
    "GLUMBConv": lambda m: blocks.GLUMBConv(m["channels"], m["expand_ratio"]),
    "attention": lambda m: blocks.LiteMLA(m["channels"], m["head_dim"], tuple(m["scales"]), m.get("norm_qk", False)),
    "EfficientViTBlock": lambda m: blocks.EfficientViTBlock(m["channels"], tuple(m["scales"])),
    "channel-averaging shortcut": lambda m: blocks.PixelUnshuffleChannelAveragingDownSampleLayer(
        m["in_channels"], m["out_channels"], m["factor"]
    ),
    "channel-duplicating shortcut": lambda m: blocks.ChannelDuplicatingPixelShuffleUpSampleLayer(
        m["in_channels"], m["out_channels"], m["factor"]
    ),
    "down-sample block": build_sampler,
    "up-sample block": build_sampler,
}


def build(case) -> torch.nn.Module:
    module = BUILD[case.meta["module"]["kind"]](case.meta["module"])
    module.load_state_dict(case.tensors(f"{case.name}/state"))
    return module.train(case.meta.get("mode") == "train")


def limit_against_exact(case) -> float:
    """Twice the error of the original against float64, but at least LIMIT."""
    return max(LIMIT, 2 * case.meta["measured"]["y_rel_l2_vs_exact"])


@pytest.mark.cases("blocks_*", but=["core_*", "half_*"])
def test_block(case, compare):
    tensors, module = case.tensors(case.name), build(case)
    x = tensors["x"].clone().requires_grad_()
    y = module(x)
    dx, *gradients = torch.autograd.grad(y, [x, *module.parameters()], tensors["dy"])
    compare(case.file, y, tensors["y"], LIMIT, "y")
    compare(case.file, dx, tensors["dx"], LIMIT, "dx")
    for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
        compare(case.file, gradient, tensors[f"grad/{name}"], LIMIT, name)
    for name, expected in case.tensors(f"{case.name}/stats").items():
        compare(case.file, module.state_dict()[name], expected, LIMIT, name)


@pytest.mark.cases("blocks_rms_norm", "half_*")
def test_rms_norm_in_half_precision(case, compare):
    tensors = case.tensors(case.name)
    y = build(case)(tensors["x"])
    assert y.dtype == tensors["x"].dtype
    compare(case.file, y, tensors["exact"], limit_against_exact(case), "y")


@pytest.mark.cases("blocks_attention", "core_*")
def test_attention_core(case, compare):
    tensors = case.tensors(case.name)
    y = functional.relu_linear_attention(tensors["qkv"], case.meta["module"]["head_dim"], eps=1e-15)
    assert y.dtype == tensors["qkv"].dtype
    compare(case.file, y, tensors["exact"], limit_against_exact(case), "y")
