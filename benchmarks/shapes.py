"""Benchmarks one direction of an autoencoder on images of many sizes in turns.

The first pass over the shapes shows what CUDA graphs cost if no shape repeats. Later passes show what they cost or gain
if more shapes repeat than a module has graphs. The memory that a contender holds after all passes is measured too.
"""

import random
import statistics
from collections.abc import Callable
from functools import partial

import torch

from . import contenders
from .autoencoder import FP32_ERROR, reason, relative_error, release
from .timing import seconds
from .workloads import ShapesWorkload

ROUNDS, PASSES = 3, 5
Calls = list[Callable[[], torch.Tensor]]  # one for each shape


def benchmark(workload: ShapesWorkload, device: torch.device) -> dict:
    """The record of a workload. The row of a contender has, over ROUNDS rounds with a new copy of the model in each:

    first_s: seconds of a pass before these rounds, which chooses the kernels that no earlier contender has chosen.
    ms, ms_low, ms_high: median, least and most milliseconds of the first pass of a round over all shapes.
    again_ms: median of the mean time of the other passes of a round.
    held_gib: the most memory that the passes of a round leave reserved, after unused memory was returned.
    error: against fp32, the largest of all shapes, in calls after the passes. More than twice eager's is wrong.
    """
    names = [name for name in workload.contenders if contenders.is_available(name)]
    reference = contenders.random_model(workload.model, device)
    half = contenders.half_of(reference, workload.largest)
    exact = [call() for call in calls_of(half, -contenders.example(workload.largest, reference, device), workload)]
    rows, samples, order = {name: {} for name in names}, {name: [] for name in names}, random.Random(0)
    for index in range(1 + ROUNDS):
        for name in order.sample(names, len(names)) if index else names:
            try:
                if index:
                    samples[name].append(trial(name, workload, device, exact))
                else:
                    rows[name]["first_s"] = seconds(partial(one_pass, prepared(name, workload, device)[0]))
            except Exception as failure:
                rows[name]["failure"] = reason(failure)
            release()
    limit = max(2 * max((sample["error"] for sample in samples["eager channels-last"]), default=0), FP32_ERROR)
    rows = {name: row if "failure" in row else row | summary(samples[name], limit) for name, row in rows.items()}
    shapes = [list(size) for size in workload.sizes]
    return {
        "workload": workload.name, "model": workload.model, "direction": workload.direction, "sizes": shapes,
        "contenders": rows,
    }  # fmt: skip


def prepared(name: str, workload: ShapesWorkload, device: torch.device) -> tuple[Calls, Calls]:
    """Calls of a new copy of the contender with every shape, and the same calls with other values."""
    half, x = contenders.prepared(name, workload.largest, device)
    return calls_of(half, x, workload), calls_of(half, -x, workload)


def calls_of(half: torch.nn.Module, x: torch.Tensor, workload: ShapesWorkload) -> Calls:
    """Calls in inference mode with parts of x, the input of the workload's largest size.

    torch.backends.cudnn.benchmark is off, since it would time cuDNN's algorithms again for each shape.
    """
    scale = workload.largest.size // x.shape[-1]
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    run = torch.inference_mode()(half)
    parts = (x[..., : height // scale, : width // scale] for height, width in workload.sizes)
    return [partial(run, part.contiguous(memory_format=layout)) for part in parts]


def one_pass(calls: Calls) -> None:
    for call in calls:
        call()


def trial(name: str, workload: ShapesWorkload, device: torch.device, exact: list[torch.Tensor]) -> dict[str, float]:
    """The figures of one round."""
    calls, others = prepared(name, workload, device)
    release()
    before = reserved()
    times = [1e3 * seconds(partial(one_pass, calls)) for _ in range(PASSES)]
    release()
    held = (reserved() - before) / 2**30
    error = largest([relative_error(call(), right) for call, right in zip(others, exact, strict=True)])
    return {"ms": times[0], "again_ms": statistics.mean(times[1:]), "held_gib": held, "error": error}


def largest(errors: list[float]) -> float:
    """The largest error; NaN if one is NaN."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def reserved() -> int:
    """Bytes that PyTorch has taken from the GPU; 0 on a CPU."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def summary(samples: list[dict[str, float]], limit: float) -> dict:
    """The figures of a row. limit: of the error."""
    of = {key: [sample[key] for sample in samples] for key in samples[0]}
    error = largest(of["error"])
    if not error <= limit:
        return {"error": error, "failure": "wrong"}
    times = {"ms": statistics.median(of["ms"]), "ms_low": min(of["ms"]), "ms_high": max(of["ms"])}
    return times | {"again_ms": statistics.median(of["again_ms"]), "held_gib": max(of["held_gib"]), "error": error}
