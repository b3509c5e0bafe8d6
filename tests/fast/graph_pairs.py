"""Shared by the tests of CUDA graphs: a model with graphs beside a copy without, calls in threads, reserved memory."""

import copy

import torch
from small_models import image, in_threads
from torch import nn

import dcae_fast


def with_and_without_graphs(model: nn.Module, cuda_graphs: bool | str = True) -> tuple[nn.Module, nn.Module]:
    """The model, patched with CUDA graphs, and a copy, patched without them."""
    plain = copy.deepcopy(model)
    dcae_fast.patch(plain, cuda_graphs=False)
    dcae_fast.patch(model, cuda_graphs=cuda_graphs)
    return model, plain


def graphs_of(module: nn.Module):
    return module.fast_options.graphs


def settle(module: nn.Module, *args, calls: int = 4) -> None:
    """Calls as a program makes them that uses each result, so that the GPU is idle before each call."""
    for _ in range(calls):
        module(*args)
        torch.cuda.synchronize()


@torch.no_grad()
def assert_right_in_threads(model: nn.Module, plain: nn.Module) -> None:
    """Calls an autoencoder in several threads, each with a stream of its own, with images of three shapes in turn."""
    inputs = [image(1, 3, 64, 64 + 32 * (seed % 3), seed=seed) for seed in range(12)]
    expected = [plain(x) for x in inputs]
    torch.cuda.synchronize()
    errors = []

    def work(offset: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for index in range(48):
                k = (5 * offset + index) % len(inputs)
                y = model(inputs[k])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(y, expected[k]):
                    errors.append((offset, index))

    in_threads(work)
    torch.cuda.synchronize()
    assert not errors
    assert len(model.encoder.fast_options.graphs) == len(model.decoder.fast_options.graphs) == 3


def reserved_memory() -> int:
    """Bytes that PyTorch reserves on the GPU when it keeps none for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
