"""Interleaved timing of several contenders in one process, and measurement of peak memory."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
FIRST = 3  # calls whose fastest says how many calls a round has: `patch` may capture a graph in one of them


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median, and the 10th and 90th percentiles."""

    median: float
    low: float
    high: float


def measure(
    contenders: dict[str, Callable[[], object]], rounds: int = 4, seconds: float = 0.1, at_least: int = 3
) -> dict[str, Timing]:
    """Times all contenders in turns, in `rounds` rounds of about `seconds` and at least `at_least` calls per contender.

    The contenders must have been called before, so that nothing is compiled during timing. Every round has a new random
    order, so that no contender always follows one that heats the chip more. On a CPU: two rounds of one call.
    """
    first = FIRST
    if not torch.cuda.is_available():
        rounds, seconds, at_least, first = 2, 0.0, 1, 1
    calls = {
        name: max(at_least, min(200, int(seconds * 1e3 / max(min(_times(run, first)), 1e-3))))
        for name, run in contenders.items()
    }
    samples = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            samples[name] += _times(contenders[name], calls[name])
    return {name: _summary(values) for name, values in samples.items()}


def alone(run: Callable[[], object], calls: int = 2) -> Timing:
    """The time of a contender that needs all memory and so cannot take turns. It must have been called before."""
    return _summary(_times(run, calls))


def seconds(run: Callable[[], object]) -> float:
    """The wall-clock time of one call, for first calls, which compile code and choose kernels."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def graphed(run: Callable[[], object], calls: int = 10) -> Callable[[], object]:
    """A function that makes `calls` calls; on a GPU, by replaying a captured graph, without launch overhead."""
    run()
    if not torch.cuda.is_available():
        return lambda: [run() for _ in range(calls)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def with_peak_memory(run: Callable[[], T]) -> tuple[T, float]:
    """The result of one call, and the peak of its allocated memory in GiB; 0 on a CPU.

    Memory allocated before, such as weights or the pool of a captured graph, does not count.
    """
    if not torch.cuda.is_available():
        return run(), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / 2**30


def _times(run: Callable[[], object], calls: int) -> list[float]:
    if not torch.cuda.is_available():
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    for event in events[:-1]:
        event.record()
        run()
    events[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]


def _summary(samples: list[float]) -> Timing:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), deciles[0], deciles[-1])
