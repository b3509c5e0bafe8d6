"""The GPU time that each layer saves in 8 bit."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from dcae_fast.ops._private import sleep_on_gpu

from . import int8, operands
from .calibration import Calibration
from .module import FastModule

ROUNDS, CALLS = 3, 4
ASLEEP = 2**21  # clock cycles for each call: longer than Python needs to launch the kernels of a block


@torch.no_grad()
def saved(autoencoder: nn.Module, calibration: Calibration, x: torch.Tensor) -> dict[str, float]:
    """Milliseconds that each layer saves in 8 bit, by name: the time of its block with this layer exact, less the time
    with it in 8 bit. All other layers compute as they do now. Negative if 8 bit takes longer.

    autoencoder: patched, in 8 bit, on a GPU. x: pictures [B, 3, H, W]; only the shape counts. The time does not include
    rounding the input of a block, since the block before usually writes it in 8 bit too.
    """
    layers = dict(int8.candidates(autoencoder))
    blocks = _blocks(autoencoder, layers)
    inputs = _shapes(autoencoder, set(blocks.values()), x)
    times = {}
    for name, found in calibration.layers.items():
        if name in layers and blocks[name] in inputs:
            block, layer = blocks[name], layers[name]
            image = torch.randn(inputs[block], device=x.device).to(x.dtype, memory_format=torch.channels_last)
            exact, in_8_bit = (_milliseconds(block, layer, scales, image) for scales in (None, found.scales))
            times[name] = exact - in_8_bit
    return times


def _blocks(autoencoder: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The block of each layer, or the module that computes the layer if no block does."""
    names, found = {layer: name for name, layer in layers.items()}, {}
    for kind in (int8.Block, FastModule):
        for module in autoencoder.modules():
            if isinstance(module, kind):
                inside = module.modules() if kind is int8.Block else module.int8_layers()
                for layer in inside:
                    if layer in names:
                        found.setdefault(names[layer], module)
    return found


def _shapes(autoencoder: nn.Module, modules: set[nn.Module], x: torch.Tensor) -> dict[nn.Module, torch.Size]:
    """The shapes of the modules' inputs."""
    shapes = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: shapes.setdefault(module, args[0].shape) and None)
        for module in modules
    ]
    try:
        autoencoder.decoder(autoencoder.encoder(x))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _milliseconds(block: nn.Module, layer: nn.Module, scales: Sequence[float] | None, x: torch.Tensor) -> float:
    """The time of block(x) with a layer in 8 bit, or exact without scales."""
    with _computing(layer, scales):
        first = block.input_factor(x) if isinstance(block, int8.Block) else None
        if first is None:
            return _gpu_milliseconds(lambda: block(x))
        q = int8.quantized(x, first)
        return _gpu_milliseconds(lambda: block.with_copy(x, [q], None))


@contextlib.contextmanager
def _computing(layer: nn.Module, scales: Sequence[float] | None) -> Iterator[None]:
    """Lets a layer compute in 8 bit, or exactly without scales."""
    before = layer.__dict__.get(operands.INT8)
    int8.unmark(layer) if scales is None else int8.mark(layer, scales)
    try:
        yield
    finally:
        int8.unmark(layer)
        if before is not None:
            layer.__dict__[operands.INT8] = before


def _gpu_milliseconds(call: Callable[[], object]) -> float:
    """The GPU's time of a call, without waiting for Python: the GPU sleeps until calls are queued."""
    call()  # chooses kernels, and makes operands
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sleep_on_gpu(CALLS * ASLEEP)
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)
