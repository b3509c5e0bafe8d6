"""The workloads of the diffusion transformers (forward, training step, sampling), and their contenders."""

from dataclasses import dataclass

import torch

PAIR = ("eager", "patched")
COMPILED = ("eager", "torch.compile", "plain + torch.compile", "patched")
AUTOTUNED = (*COMPILED, "plain + torch.compile, max-autotune")
TRAINED = (*COMPILED, "patched + torch.compile")
SAMPLED = ("eager", "patched", "patched + CUDA graphs")
ALL = (*TRAINED, "patched + CUDA graphs")
SAMPLED_IN_8_BIT = ("patched, fp8 + CUDA graphs", "patched, int8 + CUDA graphs")
INFERRED_IN_8_BIT = ("patched, fp8", "patched, int8", "torchao fp8, by row", "torchao fp8, by tensor")
TRAINED_IN_8_BIT = (
    "patched, fp8", "patched, fp8-all", "torchao tensorwise", "torchao rowwise", "torchao rowwise_with_gw_hp",
)  # fmt: skip
CURVES = ("eager", "eager, other seed", "patched", *TRAINED_IN_8_BIT[:2])


@dataclass(frozen=True)
class NetworkWorkload:
    """network: FAMILY-SIZE-LATENT. batch: number of pictures; with guidance, the network gets twice as many.

    work: "forward", "training" (one step with AdamW), "step" (one guided sampler step), "samples" (all sampler steps
    and decoding) or "loss" (several hundred training steps). checkpointed: activation checkpointing of every block.
    """

    network: str
    work: str
    batch: int
    contenders: tuple[str, ...] = PAIR
    checkpointed: bool = False

    @property
    def name(self) -> str:
        return f"{self.network}-{self.work}-b{self.batch}{'-checkpointed' if self.checkpointed else ''}"


def _each(names: str, work: str, batch: int, contenders: tuple[str, ...], **options) -> list[NetworkWorkload]:
    return [NetworkWorkload(name, work, batch, contenders, **options) for name in names.split()]


NETWORK_WORKLOADS: dict[str, list[NetworkWorkload]] = {  # by part
    "transformer": [
        NetworkWorkload("uvit-h-f8p2", "forward", 128, SAMPLED),
        NetworkWorkload("uvit-h-f32", "forward", 512, (*AUTOTUNED, *INFERRED_IN_8_BIT)),
        NetworkWorkload("uvit-h-f64", "forward", 2048, (*ALL, AUTOTUNED[-1], *INFERRED_IN_8_BIT)),
        NetworkWorkload("dit-xl-f8p2", "forward", 128),
        NetworkWorkload("dit-xl-f32", "forward", 512, (*ALL, AUTOTUNED[-1], *INFERRED_IN_8_BIT)),
        NetworkWorkload("dit-xl-f64", "forward", 2048),
        NetworkWorkload("uvit-2b-f8p2", "forward", 32),
        NetworkWorkload("uvit-2b-f32", "forward", 128),
        NetworkWorkload("uvit-2b-f64", "forward", 512),
    ],
    "training": [
        NetworkWorkload("uvit-h-f8p2", "training", 256, checkpointed=True),
        NetworkWorkload("uvit-h-f32", "training", 1024, checkpointed=True),
        NetworkWorkload("uvit-h-f64", "training", 4096, (*PAIR, *TRAINED_IN_8_BIT[:2]), checkpointed=True),
        NetworkWorkload("uvit-h-f8p2", "training", 64),
        NetworkWorkload("uvit-h-f64", "training", 1024, (*COMPILED, *TRAINED_IN_8_BIT)),
        NetworkWorkload("uvit-h-f64", "training", 512, TRAINED),
        NetworkWorkload("dit-xl-f32", "training", 128, (*COMPILED, *TRAINED_IN_8_BIT)),
        NetworkWorkload("uvit-2b-f64", "training", 512, checkpointed=True),
    ],
    "sampling": [
        NetworkWorkload(
            "uvit-h-f64", "step", 16, (*ALL, "patched, without graphs", *SAMPLED_IN_8_BIT, "torchao fp8, by row")
        ),
        *_each("uvit-h-f8p2 uvit-h-f32 uvit-2b-f64 dit-xl-f8p2 dit-xl-f32", "step", 16, SAMPLED),
        NetworkWorkload("dit-xl-f64", "step", 16, ALL),
        NetworkWorkload("uvit-h-f64", "samples", 16, (*SAMPLED, *SAMPLED_IN_8_BIT)),
        *_each("uvit-h-f32 uvit-2b-f64 dit-xl-f32", "samples", 16, SAMPLED),
    ],
    "loss-curve": [NetworkWorkload("uvit-s-f32c64", "loss", 256, CURVES)],
}

NETWORK_REHEARSAL: dict[str, list[NetworkWorkload]] = {  # for machines without a GPU
    "transformer": _each("uvit-tiny-f64 dit-tiny-f32", "forward", 2, (*SAMPLED, *INFERRED_IN_8_BIT[:2])),
    "training": [
        *_each("uvit-tiny-f64 dit-tiny-f64", "training", 2, (*PAIR, *TRAINED_IN_8_BIT[:2])),
        *_each("uvit-tiny-f64 dit-tiny-f64", "training", 2, PAIR, checkpointed=True),
    ],
    "sampling": _each("uvit-tiny-f64 dit-tiny-f32", "step", 2, SAMPLED),
    "loss-curve": [NetworkWorkload("uvit-tiny-f32c64", "loss", 4, CURVES)],
}


def network_workloads(part: str) -> list[NetworkWorkload]:
    """The workloads of a part of the benchmarks; small ones on a machine without a GPU."""
    return (NETWORK_WORKLOADS if torch.cuda.is_available() else NETWORK_REHEARSAL)[part]
