"""The transformer in training: its weights, its blocks, and how it is computed."""

import torch
from torch import nn

import dcae_fast
from dcae_fast import distributed
from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.models.dit import DiT
from dcae_fast.models.transformer import LabelEmbedder
from dcae_fast.models.uvit import UViT
from dcae_fast.training.engine.parallel import (
    apply_activation_checkpointing,
    apply_compile,
    apply_ddp,
    apply_fsdp,
)

from .config import DiffusionRun


def build_network(config: DiffusionConfig, seed: int, device: torch.device) -> UViT | DiT:
    """A network with random weights, the same on all ranks, in training mode. Seeds PyTorch's global generators.

    The network drops no labels, as `draws.draw` does so: the labels that are dropped must not depend on how the batch
    is divided among the ranks.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        network = config.build()
    for module in network.modules():
        if isinstance(module, LabelEmbedder):
            module.dropout_prob = 0.0
    return network.train()


def blocks_of(network: UViT | DiT) -> list[nn.Module]:
    """The transformer blocks, in the order of computation."""
    if isinstance(network, DiT):
        return list(network.blocks)
    return [*network.in_blocks, network.mid_block, *network.out_blocks]


def parallelize(network: UViT | DiT, run: DiffusionRun, precision: str) -> nn.Module:
    """The module to call in training: the network, which is changed in place, or DDP around it.

    precision: argument of `patch`.

    One rank compiles the whole network. Several ranks compile each block, so that the gradients of a block are sent as
    soon as they are computed. ValueError for CUDA graphs on several ranks.
    """
    ranks, blocks = distributed.world_size(), blocks_of(network)
    if run.cuda_graphs and ranks > 1:
        raise ValueError(f"cuda_graphs: expected one process, found {ranks}")
    if run.patch:
        dcae_fast.patch(network, precision=precision)
    if run.compile and ranks > 1:
        apply_compile(blocks)
    if run.checkpoint_activations:
        apply_activation_checkpointing(blocks)
    if run.compile and ranks == 1:
        apply_compile([network], mode="reduce-overhead" if run.cuda_graphs else None)
    if not distributed.is_distributed():
        return network
    return apply_ddp(network) if run.parallel == "ddp" else apply_fsdp(network, blocks)
