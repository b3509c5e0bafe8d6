"""Data parallel training of a patched model with DDP and with FSDP2, in two processes on one machine."""

import os

import pytest
import torch
import torch.distributed as dist
from small_models import DEVICE, GRADIENT, build, image, step
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dcae_fast
from dcae_fast.fast.module import is_fast

RANKS = 2
SIZE = 1, 3, 8, 8
START = "spawn" if DEVICE == "cuda" else "fork"  # CUDA does not work after a fork; a fork saves the imports


def replicate(model, rank):
    return DistributedDataParallel(model, device_ids=[rank] if DEVICE == "cuda" else None)


def shard(model, rank):
    for stage in [*model.encoder.stages, *model.decoder.stages]:
        if list(stage.parameters()):
            fully_shard(stage)
    return fully_shard(model)


def gradients(rank: int, wrap, folder: str) -> None:
    """Each process runs one backward pass on a different image. Rank 0 saves the averaged gradients in the folder."""
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
    os._exit(0)  # destroying the gloo group of DDP can wait forever for a thread that needs the GIL


def change_after_sharding(_: int, folder: str) -> None:
    """Runs in a separate process.

    fully_shard derives a new class from the class of each module. patch and unpatch change the base classes of the new
    classes.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    x, expected = image(*SIZE).cpu(), build("adaptive").cpu()(image(*SIZE).cpu()).detach()
    for is_patched in (False, True):
        model, plain = (build("adaptive").cpu() for _ in range(2))
        first = dcae_fast.patch(model) if is_patched else None
        for each in (model, plain):
            for module in (each.encoder.stages[1].op_list[0], each.encoder.stages[1], each.decoder):
                fully_shard(module, mesh=mesh)
        report = dcae_fast.patch(model)
        assert first in (None, report) and report.replaced["ResBlock"] == 2
        assert isinstance(model.decoder, FSDPModule) and is_fast(model.decoder)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
        dcae_fast.unpatch(model)
        assert [type(each).__mro__[1:] for each in model.modules()] == [
            type(each).__mro__[1:] for each in plain.modules()
        ]
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    decoder = build("adaptive").cpu().decoder
    with dcae_fast.patched(decoder):
        fully_shard(decoder, mesh=mesh)
    assert isinstance(decoder, FSDPModule) and not any(map(is_fast, decoder.modules()))
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
