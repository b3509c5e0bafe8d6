"""The processes that torchrun started, or this one alone: a thin layer over torch.distributed."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for a rank that has more to do than the others


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes of torchrun, if it started this one, for the block; yields the device of this process.

    NCCL on CUDA, with the GPU of LOCAL_RANK where torchrun gives one, and gloo elsewhere. At the end all wait for each
    other; after an error nobody does, so that torchrun can end the others.
    """
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield device
        return
    on_gpu = {"backend": "nccl", "device_id": device}
    dist.init_process_group(**on_gpu if device.type == "cuda" else {"backend": "gloo"}, timeout=PATIENCE)
    yield device
    dist.barrier()
    dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors, of one shape and dtype, in a new tensor on x's device.

    Added up in the order of the ranks, so that every rank has the same bits.
    """
    if not is_distributed():
        return x.clone()
    place = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = x.to(place).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.stack(parts).sum(0, dtype=x.dtype).to(x.device)


def all_gather(value: Any) -> list[Any]:
    """The ranks' values, which can be pickled and may differ in size, in the order of the ranks."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The main process's value, which can be pickled."""
    values = [value]
    if is_distributed():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main(work: Callable[[], T]) -> T:
    """The result of `work` in the main process, or its error, for all ranks. Called by all."""
    result, error = None, None
    if is_main():
        try:
            result = work()
        except Exception as caught:
            if not is_distributed():
                raise
            error = caught
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


class LateMaximum:
    """The largest of the ranks' numbers, one call late, so that no rank waits for the work that it has just begun."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, None

    def __call__(self, number: int) -> int:
        """Called by all ranks as often: the largest number of the call before this one; without ranks, `number`."""
        if not is_distributed():
            return number
        largest = torch.full((), number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        before, self.before = self.before, _copied_to_cpu(largest)
        return before() if before else 0


def _copied_to_cpu(x: torch.Tensor) -> Callable[[], int]:
    """Begins to copy an integer to the CPU; the function returned waits for it."""
    if not x.is_cuda:
        return x.item
    copy, done = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(x, non_blocking=True)
    done.record()

    def wait() -> int:
        done.synchronize()
        return copy.item()

    return wait


def print_main(*values: Any, error: bool = False) -> None:
    """print in the main process alone; to stderr if it is about an error."""
    if is_main():
        print(*values, file=sys.stderr if error else sys.stdout, flush=True)


def share(items: int) -> range:
    """This rank's part of so many items: consecutive, no item twice, and sizes that differ by one at most."""
    ranks = world_size()
    return range(items * rank() // ranks, items * (rank() + 1) // ranks)
