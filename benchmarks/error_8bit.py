"""python -m benchmarks.error_8bit: how much 8 bit changes transformers. Needs no GPU.

Prints the tables of docs/transformers_8bit.md.

Everything is computed in fp32, except that the operands of the named linear layers are rounded: to bf16, to 8 bit by
the references of the operators, or to float8 with other scales. So the tables show the error of the rounding only.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.images import psnr, to_uint8
from dcae_fast.models.diffusion_zoo import TINY
from dcae_fast.ops.quantize_rows import quantize_rows_reference
from dcae_fast.sampling import SAMPLERS, guided
from dcae_fast.sampling.steps import run as run_step

from . import networks
from .autoencoder import relative_error
from .network_workloads import NetworkWorkload

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
KINDS = ("qkv", "proj", "fc1", "fc2", "skip_linear")  # layers, by the last part of their names
STEPS, SCALE, SEED = 30, 3.0, 0  # of sampling the digits
SHOWN = 6  # states of a sampling for which errors are shown

Rounding = Callable[[torch.Tensor], torch.Tensor]


def by_row(x: torch.Tensor, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """As the operators round: one scale for each row, in float8 a power of two."""
    q, scale = quantize_rows_reference(x, "none", dtype)
    return q.float() * scale


def scaled(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Rounded to e4m3 so that `largest` becomes the largest number of the type."""
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3).float() * scale


ROUNDINGS: dict[str, Rounding] = {
    "bf16": lambda x: x.to(torch.bfloat16).float(),
    "e4m3": by_row,
    "e4m3, scales m / 448": lambda x: scaled(x, x.abs().amax(-1, keepdim=True)),
    "e4m3, one scale": lambda x: scaled(x, x.abs().amax()),
    "int8": partial(by_row, dtype=torch.int8),
}


@contextlib.contextmanager
def rounded(model: nn.Module, rounding: Rounding, kinds: tuple[str, ...] = KINDS) -> Iterator[None]:
    """Rounds the operands of linear layers of these kinds within a scope."""
    named = ((name.rpartition(".")[2], layer) for name, layer in model.named_modules())
    layers = [layer for name, layer in named if name in kinds and type(layer) is nn.Linear]
    for layer in layers:
        weight = rounding(layer.weight)
        layer.forward = lambda x, weight=weight, bias=layer.bias: F.linear(rounding(x), weight, bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def errors_by_layer(model: nn.Module, inputs: list[tuple], names: tuple[str, ...]) -> dict[str, list[float]]:
    """kind of layer → error of the result for each rounding in `names`, if only these layers are rounded; "all"."""
    exact = torch.stack([model(*each) for each in inputs])
    found = {}
    for kinds in (*((kind,) for kind in KINDS), KINDS):
        row = found["all" if kinds == KINDS else kinds[0]] = []
        for name in names:
            with rounded(model, ROUNDINGS[name], kinds):
                row.append(relative_error(torch.stack([model(*each) for each in inputs]), exact))
    return found


def print_table(heading: list[str], rows: dict[str, list[float]], form: str = ".1e") -> None:
    print("| " + " | ".join(heading) + " |", "|" + "---|" * len(heading), sep="\n")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(format(value, form) for value in values) + " |")
    print(flush=True)


def trajectory(model: DCAEDiffusion, labels: torch.Tensor) -> tuple[list[torch.Tensor], list[tuple]]:
    """The states after each step of sampling from a fixed seed, and the inputs of the network's calls."""
    network, states, calls = model.diffusion_model, [], []

    def observed(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append((x, t, y))
        return network(x, t, y)

    def run(network, step, x, *noise):
        states.append(run_step(network, step, x, *noise))
        return states[-1]

    config = model.config.network
    shape = len(labels), config.in_channels, config.input_size, config.input_size
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    nulls = torch.full_like(labels, config.num_classes)
    SAMPLERS[model.config.eval_scheduler](guided(observed, labels, nulls, SCALE, None), noise, STEPS, None, run)
    return states, calls


def samples(model: DCAEDiffusion, count: int) -> None:
    """Prints the distance between samples from the same seed, step by step, and between their pictures."""
    labels = torch.arange(count) % 10
    exact, calls = trajectory(model, labels)
    every = [tuple(tensor[:2] for tensor in call) for call in calls[:: max(1, len(calls) // SHOWN)]]
    print(f"Digits: error of one call, on {len(every)} states of a sampling\n")
    names = tuple(ROUNDINGS)
    print_table(["layers", *names], errors_by_layer(model.diffusion_model, every, names))
    shown = sorted({1 + i * (len(exact) - 1) // (SHOWN - 1) for i in range(SHOWN)})
    pictures = to_uint8(model.decode(exact[-1]))
    rows = {}
    for name, rounding in ROUNDINGS.items():
        with rounded(model.diffusion_model, rounding):
            states, _ = trajectory(model, labels)
        distances = [relative_error(states[step - 1], exact[step - 1]) for step in shown]
        rows[name] = [*distances, psnr(to_uint8(model.decode(states[-1])), pictures).mean().item()]
    print(f"Digits: distance of {count} samples from those in fp32 with the same seed, after each step\n")
    print_table(["rounding", *(f"step {step}" for step in shown), "pictures, dB"], rows, ".3g")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="uvit-h-f64", help="with random weights (default: %(default)s)")
    parser.add_argument("--depth", type=int, help="number of its blocks")
    parser.add_argument("--samples", type=int, default=10, help="digits to draw (default: %(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = networks.config_of(options.network)
    config = replace(config, depth=options.depth or config.depth)
    model = networks.without_zeros(networks.class_of(config)(config)).eval()
    inputs = networks.inputs_of(NetworkWorkload(options.network, "forward", 2), torch.device("cpu"))
    print(f"{options.network}, depth {config.depth}, random weights: error of the result against fp32\n")
    print_table(["layers", *ROUNDINGS], errors_by_layer(model, [inputs], tuple(ROUNDINGS)))
    del model
    samples(DCAEDiffusion.from_pretrained(TINY).eval(), options.samples)


if __name__ == "__main__":
    main()
