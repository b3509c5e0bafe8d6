"""Interleaved timing of several contenders for the same work, in one process."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Timing:
    """Milliseconds of one call: median, and the 10th and 90th percentile; peak memory of one call in GiB."""

    median: float
    low: float
    high: float
    peak_memory: float


def measure(contenders: dict[str, Callable[[], object]], rounds: int = 5, seconds: float = 0.2) -> dict[str, Timing]:
    """Time every contender in turn, `rounds` times over, about `seconds` each time, after a warm-up.

    The order is drawn anew for every round, so that none always follows one that heats the chip more or less. On a CPU
    it is a rehearsal: two short rounds.
    """
    if not torch.cuda.is_available():
        rounds, seconds = 2, 0.0
    calls = {}
    for name, run in contenders.items():
        for _ in range(3):
            run()
        calls[name] = max(3, min(200, int(seconds * 1e3 / max(_times(run, 3)[1], 1e-3))))
    samples = {name: [] for name in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contenders), len(contenders)):
            samples[name] += _times(contenders[name], calls[name])
    return {name: _summary(samples[name], contenders[name]) for name in contenders}


def graphed(run: Callable[[], object], calls: int = 10) -> Callable[[], object]:
    """`calls` calls in one: on a GPU the replay of a captured graph, so that launches do not count."""
    if not torch.cuda.is_available():
        return lambda: [run() for _ in range(calls)]
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


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


def _summary(samples: list[float], run: Callable[[], object]) -> Timing:
    deciles = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), deciles[0], deciles[-1], _peak_memory(run))


def _peak_memory(run: Callable[[], object]) -> float:
    """GiB allocated at the most during one call, weights of everything that is loaded not counted."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
