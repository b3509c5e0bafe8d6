"""`patch(model, cuda_graphs="auto")` on a GPU: which calls are captured. Needs a GPU that no other process uses."""

import pytest
import torch
from graph_pairs import graphs_of, settle, with_and_without_graphs
from small_models import build, image

import dcae_fast
from dcae_fast.ops._private import sleep_on_gpu

pytestmark = pytest.mark.gpu


@torch.no_grad()
def test_a_loop_that_waits():
    """As a program that uses each result before the next call."""
    model, plain = with_and_without_graphs(build("strided"), "auto")
    x = image(1, 3, 32, 16)
    settle(model.encoder, x)
    assert len(graphs_of(model.encoder)) == 1 and torch.equal(model.encoder(x), plain.encoder(x))


@torch.no_grad()
def test_a_loop_without_waiting():
    """Nobody waits for results between calls."""
    model, plain = with_and_without_graphs(build("strided"), "auto")
    x = image(1, 3, 32, 16)
    for _ in range(100):
        z = model.encoder(x)
    assert len(graphs_of(model.encoder)) == 1 and torch.equal(z, plain.encoder(x))


@pytest.mark.parametrize("is_waiting", [True, False])
@torch.no_grad()
def test_a_large_batch_is_not_captured(large, is_waiting):
    dcae_fast.patch(large, cuda_graphs="auto", graph_memory=2**36)
    x = torch.randn(16, 3, 512, 512, device="cuda", dtype=torch.bfloat16)
    for _ in range(6):
        z = large.encoder(x)
        if is_waiting:
            torch.cuda.synchronize()
    for _ in range(6):
        large.decoder(z)
        if is_waiting:
            torch.cuda.synchronize()
    assert len(graphs_of(large.encoder)) == len(graphs_of(large.decoder)) == 0


@torch.no_grad()
def test_judging_does_not_wait():
    """First calls, timed calls and calls whose judgement is pending do not synchronise. The capture does."""
    model, _ = with_and_without_graphs(build("strided"), "auto")
    x = image(1, 3, 16, 16)
    model.encoder(x)
    sleep_on_gpu(400_000_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            model.encoder(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "the GPU sleeps"
    assert len(graphs_of(model.encoder)) == 0
    torch.cuda.synchronize()
    settle(model.encoder, x, calls=20)
    assert len(graphs_of(model.encoder)) == 1
