"""Patched blocks of diffusion transformers under torch.compile, in inference with float32 weights under autocast."""

import copy

import pytest
import torch
from small_models import DEVICE
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

import dcae_fast
from dcae_fast.models import DiT, DiTConfig, UViT, UViTConfig
from dcae_fast.training.diffusion.network import blocks_of
from dcae_fast.training.engine.parallel import apply_compile

SIZES = {"in_channels": 8, "input_size": 4, "depth": 2, "hidden_size": 128, "num_heads": 2, "num_classes": 10}
NETWORKS = {"uvit": lambda: UViT(UViTConfig(**SIZES)), "dit": lambda: DiT(DiTConfig(**SIZES))}
every_network = pytest.mark.parametrize("name", NETWORKS)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network without zero parameters, and a patched copy."""
    torch.manual_seed(0)
    plain = NETWORKS[name]().eval().requires_grad_()
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    fast = copy.deepcopy(plain.to(DEVICE))
    assert dcae_fast.patch(fast).replaced
    torch._dynamo.reset()
    return plain, fast


def predict(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 8, 4, 4, generator=generator), torch.tensor([1.0, 400.5])
    with torch.no_grad():
        return network(x.to(DEVICE), t.to(DEVICE), torch.tensor([0, 3], device=DEVICE))


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


def assert_close(got: torch.Tensor, want: torch.Tensor):
    assert (got - want).norm() <= 1e-2 * want.norm()


@every_network
def test_compiled_code_casts_no_weights(name):
    """The operators cast them, so that autocast keeps the casts."""
    _, fast = pair(name)
    cast = []

    def record(graph, _):
        weights = [node for node in graph.graph.find_nodes(op="placeholder") if node.meta["val"].dim() < 3]
        for weight in weights:
            cast.extend(user for user in weight.users if user.target is torch.ops.prims.convert_element_type.default)
            cast.extend(user for user in weight.users if user.target is torch.ops.aten._to_copy.default)
        graphs.append(graph)
        return graph.forward

    graphs = []
    for block in blocks_of(fast):
        block.compile(fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=record))
    with autocast():
        predict(fast)
    assert graphs and not cast


def replace_storage(block, weights):
    for weight in block.parameters():
        weight.data = -weight.data


def load(block, weights):
    block.load_state_dict({name: -weight for name, weight in weights.items()})


def fuse(block, weights):
    """As LoRA's adapters are merged."""
    with torch.no_grad():
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= -1


def optimize(block, weights):
    for weight in block.parameters():
        weight.grad = weight.detach().clone()
    torch.optim.SGD(block.parameters(), lr=2.0).step()
    block.zero_grad()


@every_network
def test_results_follow_the_weights_within_one_autocast(name):
    """Of the blocks; the other layers are PyTorch's, which use what autocast keeps."""
    plain, fast = pair(name)
    counter = CompileCounter()
    for block in blocks_of(fast):
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    with autocast():
        before = predict(fast)
        compiled = counter.frame_count
        for change in (fuse, load, optimize, replace_storage):
            for pairs in zip(blocks_of(plain), blocks_of(fast), strict=True):
                weights = copy.deepcopy(pairs[0].state_dict())
                for block in pairs:
                    change(block, weights)
            with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
                expected = predict(plain)
            for _ in range(2):
                got = predict(fast)
                assert_close(got, expected)
            assert (got - before).norm() > 3e-2 * before.norm(), "the change is too small to be seen"
            before = got
    assert counter.frame_count == compiled, "compiled again"


@every_network
def test_results_follow_the_weights_after_an_autocast(name):
    """Also changes that autograd does not count."""
    plain, fast = pair(name)
    apply_compile(blocks_of(fast))
    for _ in range(3):
        with autocast():
            assert_close(predict(fast), predict(plain))
        for network in (plain, fast):
            for weight in network.parameters():
                weight.data.mul_(0.9)


@every_network
def test_a_whole_network(name):
    plain, fast = pair(name)
    counter = CompileCounter()
    fast.compile(fullgraph=True, dynamic=False, backend=counter)
    for _ in range(2):
        with autocast():
            assert_close(predict(fast), predict(plain))
    assert counter.frame_count == 1


@pytest.mark.gpu
@every_network
def test_cuda_graphs_of_inductor(name):
    """Nothing is kept in the memory of the graphs, which Inductor checks when it warms up."""
    plain, fast = pair(name)
    apply_compile(blocks_of(fast), "reduce-overhead")
    with autocast():
        for call in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
                expected = predict(plain)
            assert_close(predict(fast), expected)
            if call == 3:
                for pairs in zip(blocks_of(plain), blocks_of(fast), strict=True):
                    for block in pairs:
                        fuse(block, None)
