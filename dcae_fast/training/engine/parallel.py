"""How a network is computed: activation checkpointing, compilation, DDP, FSDP2. One function for each.

All of them change the network in place and rename no parameter: state dicts have the names of the bare network. They
are applied in the order: patch, compile the blocks, checkpoint activations, compile the whole network, DDP or FSDP2.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dcae_fast import distributed


def apply_activation_checkpointing(blocks: Iterable[nn.Module]) -> None:
    """Each block stores only its inputs, and recomputes the rest in the backward pass. A block must draw nothing at
    random.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def apply_compile(modules: Iterable[nn.Module], mode: str | None = None) -> None:
    """Compiles the forward of each module for fixed shapes. mode: of torch.compile."""
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False, mode=mode)


def apply_ddp(network: nn.Module) -> DistributedDataParallel:
    """A wrapper to call in training: every rank has all weights, and the ranks average their gradients."""
    device = next(network.parameters()).device
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)


def apply_fsdp(network: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """Shards each block, and the rest of the network as one more unit, over all ranks; returns the network.

    The ranks gather float32 weights, so that norms compute with float32 weights under autocast too.
    """
    mesh = init_device_mesh(next(network.parameters()).device.type, (distributed.world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


@contextlib.contextmanager
def gradients_summed(module: nn.Module, last: bool) -> Iterator[None]:
    """For the forward and backward pass of a part of a batch: ranks exchange gradients only in the last part.

    module: what is called in training, the result of `apply_ddp` or `apply_fsdp`, or any other module.
    """
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
    """Within the block each rank has all weights of the network, so that a rank can call it without the others."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not network, recurse=False)  # the default of fully_shard
            module.reshard()
