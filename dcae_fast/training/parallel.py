"""The network that a training computes: built, patched, checkpointed, compiled, and spread over the ranks.

No step renames a parameter: state dicts are those of the bare network.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dcae_fast
from dcae_fast import distributed
from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.models.dit import DiT
from dcae_fast.models.transformer import LabelEmbedder
from dcae_fast.models.uvit import UViT

from .config import Run


def build_network(config: DiffusionConfig, seed: int, device: torch.device) -> UViT | DiT:
    """With random weights, the same on all ranks, in training mode. Seeds PyTorch's global generators.

    It drops no labels by itself: `batches.draw` does, so that parts of a batch are independent of who computes them.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        network = config.build()
    for module in network.modules():
        if isinstance(module, LabelEmbedder):
            module.dropout_prob = 0.0
    return network.train()


def blocks_of(network: UViT | DiT) -> list[nn.Module]:
    if isinstance(network, DiT):
        return list(network.blocks)
    return [*network.in_blocks, network.mid_block, *network.out_blocks]


def checkpoint_blocks(network: UViT | DiT) -> None:
    """Each block keeps its inputs alone, and computes again in the backward pass; nothing in it is random."""
    for block in blocks_of(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_forward(module: nn.Module, cuda_graphs: bool = False) -> None:
    mode = "reduce-overhead" if cuda_graphs else None
    module.forward = torch.compile(module.forward, dynamic=False, mode=mode)


def spread(network: UViT | DiT, run: Run) -> nn.Module:
    """The module to call in training, for which `network` is changed in place: it itself, or DDP around it.

    One process compiles the whole network, several compile each block, so that its gradients leave when they are there.
    FSDP2 shards each block and the rest; the ranks gather float32 weights, which autocast rounds where norms do not.
    ValueError for CUDA graphs of several processes.
    """
    ranks, blocks = distributed.world_size(), blocks_of(network)
    if run.cuda_graphs and ranks > 1:
        raise ValueError(f"cuda_graphs: expected one process, found {ranks}")
    if run.patch:
        dcae_fast.patch(network)
    if run.compile and ranks > 1:
        for block in blocks:
            compile_forward(block)
    if run.checkpoint_activations:
        checkpoint_blocks(network)
    if run.compile and ranks == 1:
        compile_forward(network, run.cuda_graphs)
    if not distributed.is_distributed():
        return network
    device = next(network.parameters()).device
    if run.parallel == "ddp":
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (ranks,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


@contextlib.contextmanager
def gradients_summed(module: nn.Module, last: bool) -> Iterator[None]:
    """Ranks exchange the gradients of a backward pass within the block only if it is the last of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
        yield
    elif isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def gathered(network: nn.Module) -> Iterator[None]:
    """Each rank has all weights of a network within the block, so that calls of it need no other rank."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not network, recurse=False)  # as fully_shard has it
            module.reshard()
