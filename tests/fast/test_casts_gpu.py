"""Weights under autocast on a GPU are cast in the same way as in PyTorch's own layers."""

import copy
import threading

import pytest
import torch
from cuda_extension import NEEDED
from small_diffusion import DIT, UVIT, build

import dcae_fast
from dcae_fast.fast.casts import cast

pytestmark = NEEDED
BF16 = torch.bfloat16


def autocast(**options):
    return torch.autocast("cuda", BF16, **options)


def test_a_parameter_is_cast_once_until_the_autocast_ends():
    weight = torch.nn.Parameter(torch.randn(8, 8, device="cuda"))
    with autocast():
        first = cast(weight, BF16)
        with torch.no_grad(), autocast():
            assert cast(weight, BF16) is first
    weight.data.add_(1)  # which autograd does not count
    with autocast():
        assert torch.equal(cast(weight, BF16), weight.to(BF16)) and not torch.equal(first, weight.to(BF16))


def test_threads_that_autocast_side_by_side():
    """All threads share the cache of autocast. A thread that clears the cache holds the lock of the cache."""
    weights = [torch.nn.Parameter(torch.randn(16, 16, device="cuda")) for _ in range(40)]

    def run():
        for _ in range(200):
            with torch.no_grad(), autocast():
                for weight in weights:
                    cast(weight, BF16)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "they wait for each other"


def test_a_graph_casts_anew():
    weight = torch.nn.Parameter(torch.randn(8, 8, device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), autocast():
        kept = cast(weight, BF16)
        with torch.cuda.graph(graph):
            captured = cast(weight, BF16)
        assert cast(weight, BF16) is kept
        weight.add_(1)
        assert torch.equal(cast(weight, BF16), weight.to(BF16))
    graph.replay()
    assert torch.equal(captured, weight.to(BF16))


def test_a_call_before_the_capture_keeps_no_casts():
    """Casts of this call would take memory until autocast ends, in addition to the casts that the graphs read."""
    network = build(UVIT).cuda().diffusion_model
    x, t, y = torch.rand(2, 8, 4, 4, device="cuda"), torch.rand(2, device="cuda"), torch.tensor([3, 1], device="cuda")

    def kept():
        with torch.no_grad(), autocast():
            network(x, t, y)
            held = torch.cuda.memory_allocated()
            torch.clear_autocast_cache()
            return held - torch.cuda.memory_allocated()

    dcae_fast.patch(network)
    assert kept() > 0
    dcae_fast.patch(network, cuda_graphs=True)
    assert kept() == 0


def test_without_an_autocast_nothing_is_kept():
    weight = torch.nn.Parameter(torch.randn(8, 8, device="cuda"))
    for _ in range(2):
        assert torch.equal(cast(weight, torch.float16), weight.to(torch.float16))
        weight.data.add_(1)
    with autocast(cache_enabled=False):
        assert cast(weight, BF16) is not cast(weight, BF16)
    assert cast(weight, torch.float32) is weight


@pytest.mark.parametrize("config", [UVIT, DIT], ids=["uvit", "dit"])
def test_inference_leaves_the_gradients_of_its_autocast_alone(config):
    """Runs inference in the middle of a training step, under the same autocast."""
    network = build(config).cuda().diffusion_model
    dcae_fast.patch(network)
    twin = copy.deepcopy(network)
    x, t = torch.rand(2, 8, 4, 4, device="cuda"), torch.rand(2, device="cuda")
    y = torch.tensor([3, 1], device="cuda")
    for module, samples in ((network, True), (twin, False)):
        with autocast():
            if samples:
                with torch.no_grad():
                    module(x, t, y)
            module(x, t, y).square().mean().backward()
    blocks = (name for name, _ in network.named_parameters() if "block" in name and "adaLN" not in name)
    parameters, expected = dict(network.named_parameters()), dict(twin.named_parameters())
    for name in blocks:
        assert torch.equal(parameters[name].grad, expected[name].grad), name
