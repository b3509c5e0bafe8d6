"""Patched diffusion transformers compared with unpatched ones: results, gradients, dtypes, hooks, LoRA, copies."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from small_models import DEVICE
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.checkpoint import checkpoint

import dcae_fast
from dcae_fast import ops
from dcae_fast.fast.families.uvit_dit import TransformerBlock
from dcae_fast.fast.module import is_fast, original_class
from dcae_fast.models import DiT, DiTConfig, UViT, UViTConfig

SIZES = {"in_channels": 8, "input_size": 4, "depth": 2, "hidden_size": 128, "num_heads": 2, "num_classes": 10}
NETWORKS = {
    "uvit": lambda: UViT(UViTConfig(**SIZES)),
    "dit": lambda: DiT(DiTConfig(**SIZES)),
    "sit-patch2": lambda: DiT(DiTConfig(**SIZES | {"patch_size": 2}, learn_sigma=False)),
}
BLOCKS = ("Block", "DiTBlock", "FinalLayer")
HALVES = {"norm_attention": ["layer_norm", "linear", "packed_attention", "linear"], "norm_mlp": ["layer_norm", "mlp"]}


@pytest.fixture(params=NETWORKS)
def networks(request) -> tuple[nn.Module, nn.Module]:
    """An unpatched network without zero parameters, and a patched copy."""
    return pair(request.param)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = NETWORKS[name]().eval()
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    plain.to(DEVICE)
    fast = copy.deepcopy(plain)
    assert dcae_fast.patch(fast).replaced
    return plain, fast


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (
        x.to(DEVICE, dtype),
        torch.tensor([1.0, 400.5, 999.0], device=DEVICE),
        torch.tensor([0, 3, 10], device=DEVICE),
    )


def results(network: nn.Module, dtype=torch.float32, autocast: torch.dtype | None = None) -> list[torch.Tensor]:
    """The prediction, and all gradients as one vector."""
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        out = network(*inputs(dtype))
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(out.double().square().mean(), weights)
    return [out, torch.cat([gradient.double().flatten() for gradient in gradients])]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def launches(network: nn.Module, monkeypatch) -> list[str]:
    """Names of the transformer operators that one call of the network runs."""
    called = []
    with monkeypatch.context() as patch:
        for name in (*TransformerBlock.operators, *HALVES):
            run, names = getattr(ops, name), HALVES.get(name, [name])
            patch.setattr(
                ops, name, lambda *args, run=run, names=names, **kwargs: called.extend(names) or run(*args, **kwargs)
            )
        network(*inputs(next(network.parameters()).dtype))
    return called


def test_all_blocks_run_their_operators(networks, monkeypatch):
    plain, fast = networks
    called = launches(fast, monkeypatch)
    blocks = SIZES["depth"] + isinstance(plain, UViT)
    assert called.count("packed_attention") == called.count("mlp") == blocks
    assert called.count("layer_norm") == 2 * blocks + isinstance(plain, DiT)
    assert not launches(plain, monkeypatch)


def test_float32(networks):
    plain, fast = networks
    exact = results(copy.deepcopy(plain).double(), torch.float64)
    for got, eager, want in zip(results(fast), results(plain), exact, strict=True):
        assert error(got, want) <= min(1e-4, max(2 * error(eager, want), 1e-6))
    with torch.no_grad():
        assert error(fast(*inputs()), exact[0]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights"])
def test_half_precision(networks, autocast, dtype):
    """Results have the unpatched network's dtypes and at most twice its error. The limit is four times its error for
    Triton's interpreter, which truncates instead of rounding.
    """
    plain, fast = networks
    if autocast and DEVICE == "cpu" and dtype == torch.float16:
        pytest.skip("slow on a CPU")
    exact = results(copy.deepcopy(plain).double(), torch.float64)
    given = torch.float32 if autocast else dtype
    plain, fast = plain.to(given), fast.to(given)
    arguments = (given, dtype if autocast else None)
    slack = 2 if DEVICE == "cuda" else 4
    for got, eager, want in zip(results(fast, *arguments), results(plain, *arguments), exact, strict=True):
        assert got.dtype == eager.dtype
        assert error(got, want) <= slack * error(eager, want)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_compiles_whole(networks, autocast):
    _, fast = networks
    torch._dynamo.reset()
    compiled = copy.deepcopy(fast)
    compiled.compile(fullgraph=True, backend="aot_eager")
    for got, want in zip(results(compiled, autocast=autocast), results(fast, autocast=autocast), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs()), fast(*inputs()))


def test_blocks_that_are_compiled_in_place(networks):
    _, fast = networks
    blocks = fast.blocks if hasattr(fast, "blocks") else [*fast.in_blocks, fast.mid_block, *fast.out_blocks]
    expected, counter = fast(*inputs()), CompileCounter()
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend=counter)
    torch.testing.assert_close(fast(*inputs()), expected)
    assert counter.frame_count > 0


def test_hooks_are_called_and_see_what_they_would(networks):
    plain, fast = networks
    for path in ("attn", "mlp.fc1", "norm2"):
        seen = {}
        for name, network in (("plain", plain), ("fast", fast)):
            block = next(module for module in network.modules() if original_class(module).__name__ in BLOCKS)
            handle = block.get_submodule(path).register_forward_hook(
                lambda module, args, out, name=name, seen=seen: seen.setdefault(name, out.detach())
            )
            network(*inputs())
            handle.remove()
        torch.testing.assert_close(seen["fast"], seen["plain"])


def test_checkpointed_blocks(networks, monkeypatch):
    _, fast = networks
    want = results(fast)
    wrapped = copy.deepcopy(fast)
    apply_activation_checkpointing(wrapped, check_fn=lambda module: original_class(module).__name__ in BLOCKS[:2])
    for got, expected in zip(results(wrapped), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert launches(wrapped, monkeypatch)
    out = checkpoint(fast, *inputs(), use_reentrant=False)
    torch.testing.assert_close(out, want[0])


@pytest.mark.parametrize(
    "targets", [["qkv", "fc2"], ["proj", "fc1"], ["skip_linear", "linear", "decoder_pred"]], ids=str
)
def test_lora(networks, targets, monkeypatch):
    """LoRA's layers are called; all other parts still use their operators."""
    plain, fast = networks
    config, before = LoraConfig(r=2, target_modules=targets, init_lora_weights=False), launches(fast, monkeypatch)
    for network in networks:
        torch.manual_seed(1)
        inject_adapter_in_model(config, network)
    for got, want in zip(results(fast), results(plain), strict=True):
        assert error(got, want) <= 1e-5
    called = launches(fast, monkeypatch)
    assert all(called.count(name) == before.count(name) for name in ("layer_norm", "packed_attention"))
    exact = results(copy.deepcopy(plain).double(), torch.float64)
    rounded = [results(network, autocast=torch.bfloat16) for network in (fast, plain)]
    for got, eager, want in zip(*rounded, exact, strict=True):
        assert got.dtype == eager.dtype and error(got, want) <= (2 if DEVICE == "cuda" else 4) * error(eager, want)


class Distributed(torch.Tensor):
    """Stand-in for tensor subclasses such as DTensor: operators return the same subclass."""


class Quantised(torch.Tensor):
    """Stand-in for quantised weights: a linear layer with such a weight returns an ordinary tensor."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if function is nn.functional.linear else result


def test_distributed_activations_are_left_alone(networks, monkeypatch):
    _, fast = networks
    assert launches(fast, monkeypatch)
    run = inputs
    monkeypatch.setitem(globals(), "inputs", lambda *args: (run(*args)[0].as_subclass(Distributed), *run(*args)[1:]))
    assert not launches(fast, monkeypatch)


def test_quantised_layers_are_called(networks, monkeypatch):
    plain, fast = networks
    before = launches(fast, monkeypatch)
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantised), requires_grad=False)
    called = launches(fast, monkeypatch)
    assert called.count("layer_norm") == before.count("layer_norm") and not {"linear", "mlp"} & set(called)
    assert error(fast(*inputs()), plain(*inputs())) <= 2e-6


def test_layers_in_a_wrapper_are_called(networks, monkeypatch):
    """A wrapper may lack the attributes of the layer that it contains."""
    for network in networks:
        for module in network.modules():
            if original_class(module).__name__ == "Attention":
                module.qkv = nn.Sequential(module.qkv)
    plain, fast = networks
    assert launches(fast, monkeypatch).count("layer_norm") >= 2 * SIZES["depth"]
    for got, want in zip(results(fast), results(plain), strict=True):
        assert error(got, want) <= 1e-5


def test_eager_calls_embed_once():
    _, fast = pair("dit")
    calls = []
    fast.x_embedder.register_forward_hook(lambda *args: calls.append("embedded"))
    fast.blocks[0].register_forward_hook(lambda *args: calls.append("block"))
    fast(*inputs())
    assert calls == ["embedded", "block"]


def test_patches_are_the_rows_of_a_linear_layer(networks, monkeypatch):
    plain, fast = (getattr(each, "patch_embed", None) or each.x_embedder for each in networks)
    called, run = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: called.append(args) or run(*args))
    x = inputs()[0].requires_grad_()
    tokens = fast(x)
    assert len(called) == 1 and tokens.is_contiguous()
    torch.testing.assert_close(tokens, plain(x))
    weights = torch.randn_like(tokens)
    got, want = (torch.autograd.grad((each(x) * weights).sum(), (x, *each.parameters())) for each in (fast, plain))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    called.clear()
    fast.proj.register_forward_hook(lambda *args: None)
    torch.testing.assert_close(fast(x), plain(x))
    assert not called, "then the convolution is called, and its hook"


def test_norms_without_bias_run_as_they_are():
    plain, _ = pair("uvit")
    plain.mid_block.norm1 = nn.LayerNorm(SIZES["hidden_size"], bias=False, device=DEVICE)
    fast = copy.deepcopy(plain)
    dcae_fast.patch(fast)
    assert error(fast(*inputs()), plain(*inputs())) <= 2e-6


def kept_for_backward(network: nn.Module, autocast: torch.dtype | None) -> int:
    """Bytes of all tensors that the forward saves for backward, excluding parameters."""
    memory, parameters = {}, {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            memory[storage.data_ptr()] = storage  # a reference, so that the address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            x, *others = inputs(next(network.parameters()).dtype)
            _ = network(x.requires_grad_(), *others)
    return sum(storage.nbytes() for storage in memory.values())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_training_keeps_no_more_than_a_compiled_network(networks, autocast):
    """The compiled network is a strict limit: torch.compile recomputes cheap operations in backward."""
    torch._dynamo.reset()
    plain, fast = (network.to(torch.float32 if autocast else torch.bfloat16) for network in networks)
    compiled = copy.deepcopy(plain)
    for block in compiled.modules():
        if type(block).__name__ in BLOCKS:
            block.compile(backend="aot_eager_decomp_partition")
    assert kept_for_backward(fast, autocast) <= kept_for_backward(compiled, autocast)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_frozen_network_keeps_no_more_than_the_plain_one(networks, autocast):
    """Only the input requires a gradient, as in gradient-based guidance."""
    dtype = torch.float32 if autocast else torch.bfloat16
    plain, fast = (network.to(dtype).requires_grad_(False) for network in networks)
    assert kept_for_backward(fast, autocast) <= kept_for_backward(plain, autocast)


def test_dropout_that_is_on_is_not_passed_over(networks, monkeypatch):
    _, fast = networks
    block = next(module for module in fast.modules() if original_class(module).__name__ in BLOCKS)
    block.mlp.drop = nn.Dropout(0.5)
    whole = launches(fast.eval(), monkeypatch)
    assert len(launches(fast.train(), monkeypatch)) < len(whole)


def test_copies_pickles_and_unpatch(networks):
    plain, fast = networks
    want = fast(*inputs())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert sum(map(is_fast, other.modules())) == sum(map(is_fast, fast.modules()))
        torch.testing.assert_close(other(*inputs()), want, atol=0, rtol=0)
    dcae_fast.unpatch(fast)
    assert [type(module) for module in fast.modules()] == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("operator", TransformerBlock.operators)
def test_disabled_operator_is_not_called(networks, operator, monkeypatch):
    plain, fast = networks
    report = dcae_fast.patch(fast, disable=operator)
    assert report.skipped and operator not in launches(fast, monkeypatch)
    assert error(fast(*inputs()), plain(*inputs())) <= 2e-6


def test_long_skips_are_concatenated_by_their_operator(monkeypatch):
    plain, fast = pair("uvit")
    called, run = [], ops.concatenate
    monkeypatch.setattr(ops, "concatenate", lambda *args: called.append(args) or run(*args))
    fast(*inputs())
    assert len(called) == len(fast.out_blocks)
    called.clear()
    report = dcae_fast.patch(fast, disable="concatenate")
    assert report.skipped and error(fast(*inputs()), plain(*inputs())) <= 2e-6 and not called


class Attention(nn.Module):
    """Has the attributes of timm's Attention, which the original's DiT uses."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)


Attention.__module__ = "timm.models.vision_transformer"


def test_what_else_an_attention_may_have(monkeypatch):
    """A block does not use the fused forward if its attention has norms of q and k or another scale."""
    others = {"q_norm": nn.LayerNorm(64)}, {"scale": 1.0}, {"scale": nn.Parameter(torch.ones(()))}
    for change, fuses in (({}, True), *((other, False) for other in others)):
        _, fast = pair("dit")
        block = fast.blocks[0]
        attention = Attention(SIZES["hidden_size"], SIZES["num_heads"]).to(DEVICE)
        attention.load_state_dict(block.attn.state_dict())
        for name, value in change.items():
            vars(attention).pop(name, None)
            setattr(attention, name, value)
        block.attn = attention
        assert block.fuses() == fuses
