"""Memory formats: unpatched modules in a patched model receive the same formats as in an unpatched model."""

import copy

import pytest
import torch
from small_models import DEVICE, OUTPUT, build, image, step
from test_original_classes import CODERS, as_original  # noqa: F401
from torch import nn

import dcae_fast
from dcae_fast.fast import layout
from dcae_fast.fast.bands import Bands
from dcae_fast.fast.module import is_fast
from dcae_fast.fast.patch import OPERATORS
from dcae_fast.models import blocks

SAME_MODULES = {"batch_norm_act", "relu_linear_attention"}  # as bias_act and multiscale_qkv
OF_OTHER_MODELS = {"concatenate", "feature_distance", "gated_sum", "layer_norm", "linear", "mlp", "packed_attention"}
IMAGE_OPERATORS = sorted(set(OPERATORS) - SAME_MODULES - OF_OTHER_MODELS)
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class _ByOffset(torch.autograd.Function):
    """The identity for contiguous images and gradients. Like the original's norm, it ignores strides."""

    @staticmethod
    def forward(ctx, x):
        return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride()).clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.as_strided(dy, dy.shape, torch.empty(dy.shape, device="meta").stride()).clone()


def read_by_offset(model: nn.Module) -> None:
    """Put `_ByOffset` before and after every unpatched module of a DC-AE."""
    for module in model.modules():
        if not is_fast(module) and type(module).__module__.split(".")[0] in ("dcae_fast", "diffusers", *CODERS):
            own = module.forward
            module.forward = lambda x, *args, own=own: _out(own(_ByOffset.apply(x) if x.dim() == 4 else x, *args))


def _out(y):
    return _ByOffset.apply(y) if isinstance(y, torch.Tensor) and y.dim() == 4 else y


def seen_by_plain_modules(model: nn.Module, x: torch.Tensor, names: set[str]) -> dict[str, list]:
    """For each named module, in call order: dtype and strides of its inputs and of its output gradients."""
    seen = {name: [] for name in names}

    def watch(name, module):
        own = module.forward

        def forward(x, *args):
            seen[name].append(("x", x.dtype, x.stride()))
            y = own(x, *args)
            y.register_hook(lambda dy: seen[name].append(("dy", dy.dtype, dy.stride())))
            return y

        module.forward = forward

    for name, module in model.named_modules():
        if name in names:
            watch(name, module)
    step(model, x)
    return seen


def disabled(model: nn.Module, operator: str) -> set[str]:
    """Patch with one operator disabled. Returns the modules inside the coders that are unpatched for this reason."""
    fast = {name for name, module in model.named_modules() if is_fast(module)} - {"encoder", "decoder"}
    dcae_fast.patch(model, disable=operator)
    return fast - {name for name, module in model.named_modules() if is_fast(module)}


# On a GPU, memory formats in diffusers' modules depend on PyTorch's kernels: depthwise ones return contiguous images.
@pytest.mark.parametrize("name", ["strided", *(["diffusers-shuffled"] if DEVICE == "cpu" else [])])
@pytest.mark.parametrize("operator", IMAGE_OPERATORS)
def test_plain_modules_see_what_they_would(name, operator):
    model = build(name)
    fast = copy.deepcopy(model)
    dcae_fast.patch(fast)
    names, x = disabled(fast, operator), image(1, 3, 4, 8)
    assert seen_by_plain_modules(fast, x, names) == seen_by_plain_modules(model, x, names)


@pytest.mark.parametrize("operator", IMAGE_OPERATORS)
def test_modules_that_read_memory_by_offset(operator, as_original, same_step):  # noqa: F811
    """Original classes, with each operator disabled in turn."""
    model, x = as_original(build("shuffled")), image(1, 3, 4, 8)
    expected = step(model, x)
    dcae_fast.patch(model, disable=operator)
    read_by_offset(model)
    same_step(step(model, x), expected)


@torch.no_grad()
def test_norms_that_read_memory_by_offset_in_bands(as_original, compare):  # noqa: F811
    model, x = as_original(build("shuffled")), image(1, 3, 128, 4)
    latent = model.encoder(x)
    expected = model.decoder(latent)
    norm = type(model.decoder.project_out.op_list[0])
    own = norm.forward
    norm.forward = lambda self, x: own(self, _ByOffset.apply(x))
    dcae_fast.patch(model, disable="rms_norm", max_memory=1)
    for coder, value, want in ((model.encoder, x, latent), (model.decoder, latent, expected)):
        assert any(isinstance(step, Bands) for step in coder.plan(value).steps)
        compare("whole", coder(value), want, OUTPUT)


class Foreign(nn.Module):
    def forward(self, x):
        return _ByOffset.apply(x).sin()


@pytest.mark.parametrize("path", ["main.conv1.act", "main.conv2.norm", "main.conv2"])
def test_modules_of_others(path, same_step):
    """An unknown module that replaces a part of a patched coder gets contiguous images and gradients."""
    model, x = build("strided"), image(1, 3, 4, 8)
    fast = copy.deepcopy(model)
    dcae_fast.patch(fast)
    for each in (model, fast):
        parent, _, attribute = f"encoder.stages.0.op_list.0.{path}".rpartition(".")
        setattr(each.get_submodule(parent), attribute, Foreign())
    same_step(step(fast, x), step(model, x))


def test_hooks_see_contiguous_images():
    model, seen = build("strided"), []
    dcae_fast.patch(model)
    norm = model.decoder.project_out.op_list[0]
    norm.register_forward_hook(lambda module, args, out: seen.append((args[0].is_contiguous(), out.is_contiguous())))
    norm.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0].is_contiguous(), dy[0].is_contiguous())))
    step(model, image(1, 3, 4, 8))
    assert seen == [(True, True)] * 2


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["ConvLayer", "RMSNorm2d"])
def test_blocks_by_themselves(name, memory_format):
    """A block patched by itself returns results and gradients in the memory format of its input."""
    block = {"ConvLayer": blocks.ConvLayer(8, 8, norm="rms"), "RMSNorm2d": blocks.RMSNorm2d(8)}[name].to(DEVICE)
    dcae_fast.patch(block)
    x = image(2, 8, 4, 4).to(memory_format=memory_format).requires_grad_()
    y = block(x * 1)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.is_contiguous(memory_format=memory_format) and dx.is_contiguous(memory_format=memory_format)


@torch.no_grad()
def test_no_copies_between_fast_modules(monkeypatch):
    """A patched coder converts only its input and its result between memory formats; nothing in between is copied."""
    model, copies = build("strided"), []
    dcae_fast.patch(model)
    for function in ("to_channels_last", "layout_of"):
        run = getattr(layout, function)
        monkeypatch.setattr(layout, function, lambda *args, run=run: copies.append(args[0].shape) or run(*args))
    model.decoder(image(1, 8, 1, 1))
    model.decoder(image(1, 8, 2, 2))
    assert len(copies) == 4
    model.decoder(image(1, 8, 2, 2).to(memory_format=torch.channels_last))
    assert len(copies) == 4


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(2, 3, 4, 4),
        torch.empty(2, 3, 1, 1),
        torch.empty(2, 3, 1, 1).to(memory_format=torch.channels_last),
        torch.empty(2, 5, 6, 6).to(memory_format=torch.channels_last)[:, :3, :4, :4],
        torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last).mT,
        torch.empty(2, 1, 4, 4).expand(2, 3, 4, 4),
        torch.empty(2, 3, 4, 8)[..., ::2],
    ],
)
def test_is_channels_last_as_pytorch_sees_it(x):
    assert layout.is_channels_last(x) == (x.to(memory_format=torch.channels_last) is x)
