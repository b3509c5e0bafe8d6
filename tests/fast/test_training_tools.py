"""Patched models with training tools: autocast, checkpointing, LoRA, torch.compile, functional calls, hooks."""

import copy
import functools
import re
import shutil

import pytest
import torch
from small_models import (
    DEVICE,
    GRADIENT,
    OUTPUT,
    assert_as_accurate,
    build,
    build_block,
    image,
    operators_called,
    reconstruct,
    step,
    step_errors,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import dcae_fast
from dcae_fast.fast.module import is_fast, kind

TWO = pytest.mark.parametrize("name", ["shuffled", "diffusers-shuffled"])


@pytest.mark.parametrize("name", ["strided", "diffusers-strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name, dtype):
    """Results have the same dtype as without `patch`, and at most twice the error relative to float32."""
    model, pictures = build(name, wide=True), [image(1, 3, 8, 8, seed=seed) for seed in range(8)]
    exact = [step(model, x) for x in pictures]

    def under_autocast(x):
        with torch.autocast(DEVICE, dtype):
            return step(model, x)

    expected = [under_autocast(x) for x in pictures]
    eager = [step_errors(got, want) for got, want in zip(expected, exact, strict=True)]
    dcae_fast.patch(model)
    got = under_autocast(pictures[0])
    assert {name: value.dtype for name, value in got.items()} == {n: value.dtype for n, value in expected[0].items()}
    assert_as_accurate(step_errors(got, exact[0]), eager)


@TWO
def test_activation_checkpointing(name, same_step):
    model, x = build(name), image(1, 3, 8, 8)
    dcae_fast.patch(model)
    expected = step(model, x)
    for path, stage in model.named_modules():
        if re.fullmatch(r"(en|de)coder\.(stages|down_blocks|up_blocks)\.\d", path):
            stage.forward = functools.partial(checkpoint, stage.forward, use_reentrant=False)
    results = []
    called = operators_called(lambda: results.append(step(model, x)))
    same_step(results[0], expected)
    assert called["rms_norm"] > called["rms_norm_backward"] > 0


@pytest.mark.parametrize("patch_first", [False, True], ids=["lora-patch", "patch-lora"])
@pytest.mark.parametrize(
    "name, targets",
    [
        ("EfficientViTBlock", r".*(qkv|proj|inverted_conv|point_conv)\.conv"),
        ("ResBlock", r".*conv\d\.conv"),
        ("diffusers-EfficientViTBlock", r".*(to_q|to_v|to_out|conv_inverted|conv_point)"),
    ],
)
def test_lora(name, targets, patch_first, same_step):
    peft = pytest.importorskip("peft")
    block, x = build_block(name)
    fast = copy.deepcopy(block)
    if patch_first:
        dcae_fast.patch(fast)
    for model in (block, fast):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
    dcae_fast.patch(fast)
    expected = step(block, x)
    assert sum("lora" in key for key in expected) > 2 and not any("base_layer" in key for key in expected)
    assert all(value.any() for key, value in expected.items() if "lora" in key)
    same_step(step(fast, x), expected)


class Graphs:
    """A torch.compile backend that runs graphs unchanged and records the functions they call."""

    def __init__(self):
        self.targets = []

    def __call__(self, graph, inputs):
        self.targets.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def operators(self, index: int = -1) -> list[str]:
        return sorted(t.split(".")[1] for t in self.targets[index] if t.startswith("dcae_fast."))


@pytest.mark.parametrize("name", ["strided", "diffusers-shuffled"])
def test_compile(name, same_step):
    """Forward and backward are compiled to one graph each."""
    model, x = build(name), image(1, 3, 8, 8)
    expected = step(model, x)
    dcae_fast.patch(model)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    same_step(step(model, x), expected)


@TWO
@torch.no_grad()
def test_compiled_operators_are_those_that_run_otherwise(name, compare):
    model, x = build(name), image(1, 3, 8, 8)
    dcae_fast.patch(model)
    results = []
    called = operators_called(lambda: results.append(reconstruct(model, x)))
    torch._dynamo.reset()
    graphs = Graphs()
    model.compile(fullgraph=True, backend=graphs)
    compare("eager", reconstruct(model, x), results[0], OUTPUT)
    assert graphs.operators() == sorted(called.elements())


@torch.no_grad()
def test_patch_after_compile(compare):
    model, x = build("adaptive"), image()
    expected = model(x)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for change, fast in [(None, False), (dcae_fast.patch, True), (dcae_fast.unpatch, False)]:
        if change:
            change(compiled)
        compare("eager", compiled(x), expected, OUTPUT)
        if change is not dcae_fast.unpatch:  # after unpatch, torch.compile reuses the first graph
            assert bool(graphs.operators()) == fast


def checkpointed(module):
    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def hooked(module):
    """Adds a hook as accelerate does for offloading and for autocast."""
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def coders(model):
    return [model.encoder, model.decoder]


def blocks(model):
    return [module for module in model.modules() if is_fast(module) and kind(module) == "ResBlock"]


@pytest.mark.parametrize("wrap", [checkpointed, hooked])
@pytest.mark.parametrize("parts", [coders, blocks])
def test_forwards_replaced_while_patched(parts, wrap, same_step):
    """A replaced forward calls the fast forward while the module is patched, and the original forward afterwards."""
    model, x = build("adaptive"), image(1, 3, 8, 8)
    original, expected = [type(module) for module in model.modules()], step(model, x)
    report = dcae_fast.patch(model)
    fast = [type(module) for module in model.modules()]
    for module in parts(model):
        wrap(module)

    def check(classes):
        assert [type(module) for module in model.modules()] == classes
        called = operators_called(lambda: same_step(step(model, x), expected))
        assert bool(called) == (classes == fast)

    check(fast)
    assert dcae_fast.patch(model) == report
    check(fast)
    with dcae_fast.patched(model, disable="all"):
        check(original)
    check(fast)
    dcae_fast.unpatch(model)
    check(original)
    left = set(dcae_fast.patch(model).skipped) - set(report.skipped)
    assert left and all(reason.endswith("its forward was replaced on the instance") for *_, reason in left)
    same_step(step(model, x), expected)


@torch.no_grad()
def test_forwards_compiled_while_patched(compare):
    model, x = build("adaptive"), image()
    expected = model(x)
    dcae_fast.patch(model)
    torch._dynamo.reset()
    graphs = Graphs()
    for coder in coders(model):
        coder.forward = torch.compile(coder.forward, fullgraph=True, backend=graphs)
    compare("eager", model(x), expected, OUTPUT)
    assert len(graphs.targets) == 2 and graphs.operators(0) and graphs.operators(1)
    dcae_fast.patch(model)
    compare("eager", model(x), expected, OUTPUT)
    assert len(graphs.targets) == 2
    dcae_fast.unpatch(model)
    compare("eager", model(x), expected, OUTPUT)
    assert len(graphs.targets) == 4 and not graphs.operators(2) and not graphs.operators(3)


@pytest.mark.skipif(not torch.cuda.is_available() and shutil.which("g++") is None, reason="no compiler for Inductor")
def test_inductor(same_step):
    model, x = build("adaptive"), image()
    expected = step(model, x)
    dcae_fast.patch(model)
    torch._dynamo.reset()
    model.compile(fullgraph=True)
    same_step(step(model, x), expected)


def test_functional_call(compare):
    """Gradients with respect to parameters that the caller passes to functional_call."""
    block, x = build_block("ResBlock")
    weights = {name: 0.5 * parameter.detach() for name, parameter in block.named_parameters()}

    def gradients():
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        return torch.autograd.grad(torch.func.functional_call(block, leaves, x).square().sum(), list(leaves.values()))

    expected = gradients()
    dcae_fast.patch(block)
    for name, gradient, want in zip(weights, gradients(), expected, strict=True):
        compare("eager", gradient, want, GRADIENT, name)


def test_some_gradients_and_none():
    """Gradients of only the weights or only the input, and no gradients in inference mode."""
    block, x = build_block("EfficientViTBlock")
    dcae_fast.patch(block)
    expected = step(block, x)
    block(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
    block.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(block(leaf).sum(), leaf)[0].isfinite().all()
    with torch.inference_mode():
        assert torch.equal(block(x), expected["output"])
    assert not block(x).requires_grad


def test_in_a_sequence_of_other_modules(compare):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), build_block("ResBlock")[0], nn.Sigmoid()).to(DEVICE)
    x = image()
    expected = model(x)
    dcae_fast.patch(model)
    compare("eager", model(x), expected, OUTPUT)


@pytest.mark.parametrize("name", ["ResBlock", "EfficientViTBlock", "diffusers-EfficientViTBlock"])
def test_second_derivatives_and_transforms(name, compare):
    """A gradient penalty, forward-mode AD and torch.func. Custom operators do not support the last two."""
    block, x = build_block(name)
    fast = copy.deepcopy(block)
    dcae_fast.patch(fast)

    def penalty(module):
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [leaf, *module.parameters()])

    for value, expected in zip(penalty(fast), penalty(block), strict=True):
        compare("eager", value, expected, GRADIENT, "second derivative")
    for transform in (
        lambda module: torch.func.jvp(module, (x,), (x,))[1],
        lambda module: torch.func.grad(lambda leaf: module(leaf).square().sum())(x),
    ):
        compare("eager", transform(fast), transform(block), GRADIENT, "torch.func")
        torch._dynamo.reset()
        compiled = torch.compile(lambda fast=fast, transform=transform: transform(fast), backend="aot_eager")
        compare("eager", compiled(), transform(block), GRADIENT, "torch.func, compiled")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        value, expected = (torch.autograd.forward_ad.unpack_dual(module(dual)).tangent for module in (fast, block))
    compare("eager", value, expected, GRADIENT, "forward-mode AD")


@TWO
@pytest.mark.parametrize("kind", ["forward", "full_backward"])
def test_global_hooks(name, kind):
    model, x = build(name), image(1, 3, 8, 8)

    def called():
        names = []
        register = getattr(nn.modules.module, f"register_module_{kind}_hook")
        handle = register(lambda module, *_: names.append(id(module)))
        step(model, x)
        handle.remove()
        return sorted(names)

    expected = called()
    dcae_fast.patch(model)
    assert called() == expected
