"""The time that the steps of a training take, and how much of it the device waits for data."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Measures the time since the last `restart`, and the share of it in which the device was idle between two steps.

    On CUDA, events before and after the work of each step measure the idle time: a late batch costs nothing if it finds
    the device busy.
    """

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.restart()

    def mark(self) -> None:
        """Called before the work of each step, and after it."""
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def restart(self) -> None:
        self.marks: list[Any] = []
        self.began = time.perf_counter()
        self.mark()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time within the block does not count."""
        if self.on_cuda:
            torch.cuda.synchronize()
        self.mark()
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began
        self.mark()

    def read(self) -> tuple[float, float]:
        """Seconds since `restart`, and the share of them in which the device was idle. The device must be done."""
        seconds, waits = time.perf_counter() - self.began, zip(self.marks[::2], self.marks[1::2], strict=False)
        if self.on_cuda:
            waited = sum(end.elapsed_time(start) for end, start in waits) / 1000
        else:
            waited = sum(start - end for end, start in waits)
        return seconds, waited / seconds
