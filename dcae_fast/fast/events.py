"""CUDA events that may be queried while another thread captures a graph."""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


class Event(torch.cuda.Event):
    """An event whose queries neither fail nor break the capture of another thread.

    While a thread captures in CUDA's default mode ("global"), CUDA refuses queries of events in all threads, because a
    capture cannot record what a program does with the answer. The answers here never decide what is captured.
    """

    def query(self) -> bool:
        with _during_captures():
            return super().query()

    def elapsed_time(self, end: "Event") -> float:
        with _during_captures():
            return super().elapsed_time(end)


def recorded_event(device: torch.device) -> Event:
    """An event with a time, recorded on the current stream."""
    event = Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


@contextlib.contextmanager
def _during_captures() -> Iterator[None]:
    exchange, mode = _exchange_mode(), ctypes.c_int(RELAXED)
    exchange(ctypes.byref(mode))  # of this thread; afterwards `mode` is the former mode
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@functools.cache
def _exchange_mode() -> Callable:
    """cuThreadExchangeStreamCaptureMode of the CUDA driver; without this library a function that does nothing."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except OSError:  # on AMD's GPUs, for example
        return lambda mode: None
