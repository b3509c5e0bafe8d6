"""A patched model in data parallel training, replicated and sharded: two processes on one machine."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from small_models import DEVICE, GRADIENT, build, image, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dcae_fast

RANKS = 2
SIZE = 1, 3, 8, 8
START = "spawn" if DEVICE == "cuda" else "fork"  # CUDA does not work in a fork, which need not import anything


def replicate(model, rank):
    return DistributedDataParallel(model, device_ids=[rank] if DEVICE == "cuda" else None)


def shard(model, rank):
    for stage in [*model.encoder.stages, *model.decoder.stages]:
        if list(stage.parameters()):
            fully_shard(stage)
    return fully_shard(model)


def gradients(rank: int, wrap, folder: str) -> None:
    """In each process: one backward pass on an image of its own, whose averaged gradients go into the folder."""
    torch.set_num_threads(1)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    model = build("shuffled").train()
    dcae_fast.patch(model)
    wrapped = wrap(model.to(torch.device(DEVICE, rank) if DEVICE == "cuda" else DEVICE), rank)
    x = image(*SIZE, seed=rank).to(next(model.parameters()).device)
    y = wrapped(x)
    (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    if rank == 0:
        torch.save({name: grad.cpu() for name, grad in found.items()}, f"{folder}/gradients.pt")
    dist.barrier()
    os._exit(0)  # destroying a gloo group of DDP's may wait forever for a thread that needs the interpreter's lock


def change_after_sharding(_: int, folder: str) -> None:
    """In a process of its own: patch and unpatch say what they cannot change, and change nothing then."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    for is_patched in (False, True):
        model = build("adaptive").cpu()
        first = dcae_fast.patch(model) if is_patched else None
        for module in (model.encoder.stages[1].op_list[0], model.encoder.stages[1], model.decoder):
            fully_shard(module, mesh=mesh)
        before = [type(module) for module in model.modules()]
        if is_patched:
            assert dcae_fast.patch(model) == first
            refused = [dcae_fast.unpatch, partial(dcae_fast.patch, disable="all")]
        else:
            dcae_fast.unpatch(model)
            assert not dcae_fast.patch(model, disable="all").replaced
            refused = [dcae_fast.patch, partial(dcae_fast.patch, cuda_graphs=True)]
        for change in refused:
            with pytest.raises(RuntimeError, match="OpSequential has a class that fully_shard made"):
                change(model)
        assert [type(module) for module in model.modules()] == before
    decoder = build("adaptive").cpu().decoder
    with pytest.raises(RuntimeError, match="before fully_shard"), dcae_fast.patched(decoder):
        fully_shard(decoder, mesh=mesh)
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
def test_classes_of_fully_shard(tmp_path):
    torch.multiprocessing.start_processes(change_after_sharding, (str(tmp_path),), start_method=START)


@pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < RANKS, reason="needs two GPUs, or none")
@pytest.mark.parametrize("wrap", [replicate, shard], ids=["DDP", "FSDP2"])
def test_gradients_are_those_of_one_process(wrap, tmp_path, compare):
    torch.multiprocessing.start_processes(gradients, (wrap, str(tmp_path)), RANKS, start_method=START)
    steps = [step(build("shuffled").train(), image(*SIZE, seed=rank)) for rank in range(RANKS)]
    for name, gradient in torch.load(tmp_path / "gradients.pt").items():
        mean = sum(result[f"gradient of {name}"] for result in steps) / RANKS
        compare("eager", gradient, mean, GRADIENT, name)
