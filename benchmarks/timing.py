"""Interleaved timing of several contenders for the same work, in one process, and peak memory."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def measure(
    contenders: dict[str, Callable[[], object]], rounds: int = 4, seconds: float = 0.1, at_least: int = 3
) -> dict[str, Timing]:
    """Time every contender in turn, `rounds` times over, for about `seconds` and at least `at_least` calls each time.

    They have been called before, so that nothing is compiled now. The order is drawn anew for every round, so that none
    always follows one that heats the chip more or less. On a CPU it is a rehearsal: two rounds of one call.
    """
    if not torch.cuda.is_available():
        rounds, seconds, at_least = 2, 0.0, 1
    calls = {
        name: max(at_least, min(200, int(seconds * 1e3 / max(_times(run, 1)[0], 1e-3))))
        for name, run in contenders.items()
    }
    samples = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            samples[name] += _times(contenders[name], calls[name])
    return {name: _summary(values) for name, values in samples.items()}


def alone(run: Callable[[], object], calls: int = 2) -> Timing:
    """The time of something that leaves no room for others; it has been called before."""
    return _summary(_times(run, calls))


def seconds(run: Callable[[], object]) -> float:
    """The time of one call, on the clock: of a first one, in which code is compiled and kernels are chosen."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def graphed(run: Callable[[], object], calls: int = 10) -> Callable[[], object]:
    """`calls` calls in one: on a GPU the replay of a captured graph, so that launches do not count."""
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
    """The result of one call, and the GiB that it allocated at the most; on a CPU 0.

    What was there before, like weights, does not count, nor does the pool that a captured graph keeps.
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
