"""A thin layer over torch.distributed that also works in a single process without torchrun."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dcae_fast.errors import DeviceError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # ranks may wait long for a rank with more work


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins torchrun's process group for the block, if torchrun started this process. Yields this process's device.

    On CUDA, the backend is NCCL and the device is the GPU with the number LOCAL_RANK, if set; elsewhere the backend is
    gloo. At the end of the block all ranks wait for each other. After an error this rank does not wait, so that
    torchrun can end the others. Raises DeviceError for wrong environment variables.
    """
    try:
        device = _join(device)
    except ValueError as error:
        reason = "the environment has RANK or LOCAL_RANK, as torchrun sets them"
        raise DeviceError(f"{reason}, but the processes cannot be joined: {error}") from error
    yield device
    if "RANK" in os.environ:
        dist.barrier()
        dist.destroy_process_group()


def _join(device: torch.device) -> torch.device:
    """Joins torchrun's process group, if there is one. Returns this process's device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        on_gpu = {"backend": "nccl", "device_id": device}
        dist.init_process_group(**on_gpu if device.type == "cuda" else {"backend": "gloo"}, timeout=TIMEOUT)
    return device


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this is the main process, rank 0, which prints and writes files for all ranks."""
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors, which must have equal shapes and dtypes, as a new tensor on the device of x.

    The sum is taken in the order of the ranks, so that every rank gets the same bits.
    """
    if not is_distributed():
        return x.clone()
    place = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = x.to(place).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.stack(parts).sum(0, dtype=x.dtype).to(x.device)


def all_gather(value: Any) -> list[Any]:
    """All ranks' values in the order of the ranks. Values must be picklable and may differ in size."""
    if not is_distributed():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The main process's value, which must be picklable."""
    values = [value]
    if is_distributed():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main(work: Callable[[], T]) -> T:
    """Runs `work` in the main process; returns its result, or raises its error, on all ranks. Called by all ranks."""
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
    """The maximum of the ranks' numbers, one call late, so that no rank waits for GPU work that it just queued."""

    def __init__(self, device: torch.device):
        self.device, self.previous = device, None

    def __call__(self, number: int) -> int:
        """The maximum of the previous call's numbers, 0 at the first call; in a single process, `number`.

        All ranks must call this equally often.
        """
        if not is_distributed():
            return number
        largest = torch.full((), number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        previous, self.previous = self.previous, _copied_to_cpu(largest)
        return previous() if previous else 0


def _copied_to_cpu(x: torch.Tensor) -> Callable[[], int]:
    """Starts to copy an integer to the CPU; the returned function waits for the copy and returns the integer."""
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
    """Prints in the main process only; to stderr if `error` is set."""
    if is_main():
        print(*values, file=sys.stderr if error else sys.stdout, flush=True)


def share(items: int) -> range:
    """This rank's consecutive part of `items` items. The parts are disjoint and their sizes differ by at most one."""
    ranks = world_size()
    return range(items * rank() // ranks, items * (rank() + 1) // ranks)
