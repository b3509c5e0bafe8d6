"""Calls of patched modules: keyword arguments, tensor subclasses, dtypes, meta tensors, function transforms."""

import copy
import inspect

import pytest
import torch
from small_models import BLOCKS, DEVICE, build, build_block, image, operators_called
from torch import nn
from torch.utils._pytree import tree_map

import dcae_fast
from dcae_fast.fast.module import is_fast
from dcae_fast.models import DiT, DiTConfig, UViT, UViTConfig, blocks, dit

SIZES = {"in_channels": 8, "input_size": 4, "depth": 2, "hidden_size": 64, "num_heads": 1, "num_classes": 10}


class DiTBlock(dit.DiTBlock):
    """Stand-in for the original's class, with the same name and argument names."""

    __module__ = "dc_gen.c2icore.diffusioncore.models.dit"

    def forward(self, x, c):
        return super().forward(x, c)


class RMSNorm2d(nn.LayerNorm):
    """The original's norm written in PyTorch. Its result has the promoted dtype."""

    __module__ = "dc_gen.models.nn.norm"

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = x / torch.sqrt(torch.square(x).mean(dim=-1, keepdim=True) + self.eps)
        return (x * self.weight + self.bias).permute(0, 3, 1, 2)


def original_block() -> nn.Module:
    block = DiT(DiTConfig(**SIZES)).blocks[0]
    block.__class__ = DiTBlock
    return block


def layer_with_plain_norm() -> nn.Module:
    layer = blocks.ConvLayer(8, 8, 1, norm="rms")
    layer.norm = RMSNorm2d(8)
    return layer


TOKENS, CONDITION = (2, 16, 64), (2, 64)
TRANSFORMERS = {
    "DiTBlock": (lambda: DiT(DiTConfig(**SIZES)).blocks[0], TOKENS, CONDITION),
    "original DiTBlock": (original_block, TOKENS, CONDITION),
    "FinalLayer": (lambda: DiT(DiTConfig(**SIZES)).final_layer, TOKENS, CONDITION),
    "PatchEmbed": (lambda: DiT(DiTConfig(**SIZES)).x_embedder, (2, 8, 4, 4)),
    "Block": (lambda: UViT(UViTConfig(**SIZES)).out_blocks[0], TOKENS, TOKENS),
}
MODULES = [*BLOCKS, *TRANSFORMERS, "ConvLayer with the original's RMSNorm2d"]


def module_and_inputs(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    if name in BLOCKS:
        module, x = build_block(name)
        return module, [x]
    make, *shapes = TRANSFORMERS.get(name, (layer_with_plain_norm, (1, 8, 2, 2)))
    module = make().eval().to(DEVICE)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return module, [image(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def patched_copy(module: nn.Module) -> nn.Module:
    """A patched copy of a module that shares a model with a DC-AE, so that parts of coders are patched."""
    model = nn.Sequential(module, build("adaptive"))
    model = copy.deepcopy(model)
    dcae_fast.patch(model)
    return model[0]


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_arguments_by_name(name):
    module, inputs = module_and_inputs(name)
    names = [each for each in inspect.signature(module.forward).parameters][: len(inputs)]
    fast = patched_copy(module)
    expected = fast(*inputs)
    by_name = dict(zip(names, inputs, strict=True))
    torch.testing.assert_close(fast(**dict(reversed(by_name.items()))), expected, rtol=0, atol=0)
    assert operators_called(lambda: fast(**by_name)) == operators_called(fast, *inputs)
    assert inspect.signature(fast.forward) == inspect.signature(module.forward)
    with pytest.raises(TypeError):
        fast(*inputs, nonsense=1)


def result_type(module: nn.Module, inputs: list[torch.Tensor], autocast: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the module's result; None if PyTorch does not support this combination of dtypes."""
    try:
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            return module(*inputs).dtype
    except RuntimeError:
        return None


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_types_of_results(name):
    """Results have the same dtype as without `patch`, for all dtypes of weights, inputs and autocast."""
    module, inputs = module_and_inputs(name)
    fast = patched_copy(module)
    for weights in (torch.float32, torch.bfloat16):
        module, fast = module.to(weights), fast.to(weights)
        for given in (torch.float32, torch.bfloat16, torch.float16):
            for autocast in (None, torch.bfloat16, torch.float16):
                cast = [tensor.to(given) for tensor in inputs]
                want = result_type(module, cast, autocast)
                assert want is None or result_type(fast, cast, autocast) == want, (weights, given, autocast)


class Quantised(torch.Tensor):
    """An 8-bit weight that only PyTorch's own operators support."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight):
        self.scale = weight.abs().amax() / 127
        self.values = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} does not know quantised tensors")
        args = tree_map(lambda a: a.values.to(a.dtype) * a.scale if isinstance(a, cls) else a, args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in MODULES if "original" not in name])
@torch.no_grad()
def test_weights_of_a_subclass(name):
    """One weight at a time is quantised; its module then runs its original forward."""
    module, inputs = module_and_inputs(name)
    for path, weight in list(module.named_parameters()):
        plain, fast = copy.deepcopy(module), patched_copy(module)
        for each in (plain, fast):
            parent, _, attribute = path.rpartition(".")
            quantised = nn.Parameter(Quantised(weight.detach()), requires_grad=False)
            setattr(each.get_submodule(parent), attribute, quantised)
        torch.testing.assert_close(fast(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)


class Distributed(torch.Tensor):
    """Stand-in for tensor subclasses such as DTensor: operators return the same subclass."""


@pytest.mark.parametrize("name", ["ResBlock", "EfficientViTBlock", "diffusers-EfficientViTBlock", "DiTBlock", "Block"])
@torch.no_grad()
def test_inputs_of_a_subclass(name):
    module, inputs = module_and_inputs(name)
    fast = patched_copy(module)
    for place in range(len(inputs)):
        given = [x.as_subclass(Distributed) if place == each else x for each, x in enumerate(inputs)]
        assert not operators_called(fast, *given)
        out = fast(*given)
        assert isinstance(out, Distributed)
        torch.testing.assert_close(out.as_subclass(torch.Tensor), module(*inputs))


@pytest.mark.parametrize("name", ["ResBlock-batch", "EfficientViTBlock", "diffusers-up", "DiTBlock", "Block"])
def test_jacobian(name):
    """Batched gradients (vmap over backward) with respect to inputs and parameters."""
    module, inputs = module_and_inputs(name)
    fast = patched_copy(module)
    found = []
    for each in (module, fast):
        x, *rest = [x.clone().requires_grad_() for x in inputs]
        y = each(x, *rest)
        dys = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        found.append(torch.autograd.grad(y, [x, *rest, *each.parameters()], dys, is_grads_batched=True))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_vectorised_jacobian_of_a_decoder():
    model = build("adaptive")
    z = image(1, 8, 1, 1)
    want = torch.autograd.functional.jacobian(model.decoder, z)
    dcae_fast.patch(model)
    got = torch.autograd.functional.jacobian(model.decoder, z, vectorize=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("gradient", [False, True])
def test_traced_by_jit(gradient):
    model, z = build("adaptive"), image(1, 8, 1, 2)
    expected = model.decoder(z)
    dcae_fast.patch(model)
    with torch.set_grad_enabled(gradient):
        traced = torch.jit.trace(model.decoder, z.requires_grad_(gradient), check_trace=False)
    assert "dcae_fast::" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(z), expected, rtol=1e-4, atol=1e-5)


def test_keywords_in_a_compiled_call():
    model, z = build("adaptive"), image(1, 8, 1, 2).requires_grad_()
    dcae_fast.patch(model)
    want = model.decoder(z)
    torch._dynamo.reset()
    got = torch.compile(lambda z: model.decoder(z=z), fullgraph=True, backend="aot_eager")(z)
    for value, expected in ((got, want), *zip(*(torch.autograd.grad(y.sum(), z) for y in (got, want)), strict=True)):
        torch.testing.assert_close(value, expected)
        assert value.stride() == expected.stride()


@pytest.mark.parametrize("mark", [torch._neg_view, lambda z: torch._efficientzerotensor(z.shape)], ids=["-", "0"])
@torch.no_grad()
def test_marked_tensors(mark):
    """Inputs, then weights, that are negated or zero only by a flag of the tensor, not in memory."""
    model, z = build("adaptive"), image(1, 8, 1, 2)
    fast = copy.deepcopy(model)
    dcae_fast.patch(fast)
    torch.testing.assert_close(fast.decoder(mark(z).to(DEVICE)), model.decoder(mark(z).to(DEVICE)))
    for each in (model, fast):
        for parameter in each.parameters():
            parameter.data = torch._neg_view(parameter.data)
    torch.testing.assert_close(fast.decoder(z), model.decoder(z))


@torch.no_grad()
def test_on_the_meta_device():
    model, x = build("strided").to("meta"), image().to("meta")
    expected = model(x)
    dcae_fast.patch(model)
    assert model(x).is_meta and model(x).shape == expected.shape


@torch.no_grad()
def test_a_list_of_latents():
    """`decode` accepts the list of latents that `encode` returns for several channel counts, patched or not."""
    model, x = build("adaptive"), image()
    for patched in (False, True):
        if patched:
            dcae_fast.patch(model)
        latents = model.encode(x, [4, 8])
        pictures = model.decode(latents)
        assert isinstance(pictures, list)
        for picture, latent in zip(pictures, latents, strict=True):
            torch.testing.assert_close(picture, model.decode(latent), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"z has shape \[1, 9, 2, 2\]"):
        model.decode([latents[0], image(1, 9, 2, 2)])
    with pytest.raises(TypeError, match=r"Decoder.forward\(\) got an unexpected keyword argument 'latents'"):
        model.decoder(latents=latents)


def replica_of(module: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes it on another GPU: its weights are attributes."""
    replica = module._replicate_for_data_parallel()
    replica._modules = {name: replica_of(child) for name, child in module._modules.items()}
    for name, weight in module._parameters.items():
        replica.__dict__[name] = None if weight is None else weight.clone()
    return replica


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True, "frozen": True}], ids=str)
def test_replicas_of_data_parallel(options):
    model, x = build("strided"), image()
    expected = model(x)
    dcae_fast.patch(model, **options)
    replica = replica_of(model)
    torch.testing.assert_close(replica(x), expected)
    assert is_fast(model.encoder) and not any(map(is_fast, replica.modules()))


def test_fast_classes_have_the_names_of_their_bases():
    """Libraries write the names into files, and compare them with names of their own."""
    block, _ = build_block("ResBlock")
    plain = type(block.main)
    text = repr(block)
    dcae_fast.patch(block)
    fast = type(block.main)
    assert fast is not plain and is_fast(block.main)
    assert all(getattr(fast, name) == getattr(plain, name) for name in ("__name__", "__qualname__", "__module__"))
    assert "(main): FastResBlock(" in repr(block)
    dcae_fast.unpatch(block)
    assert repr(block) == text and type(block.main) is plain
