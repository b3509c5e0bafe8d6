"""Benchmarks the forward of a diffusion transformer; also functions shared with the other network benchmarks.

Only the first samples of a contender's batch are checked against fp32: samples do not depend on each other.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from . import networks
from .autoencoder import ERROR_IN_8_BIT, FP32_ERROR, reason, relative_error, release
from .ceilings import Ceilings
from .network_workloads import NetworkWorkload
from .timing import Timing, measure, seconds, with_peak_memory

CHECKED = 4  # samples that are checked
Run = Callable[[], torch.Tensor]


def benchmark(workload: NetworkWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record of a workload: error, peak memory, time, images/s and MFU of each contender, or a failure."""
    torch.compiler.reset()
    reference = networks.random_network(workload.network, device)
    inputs = networks.inputs_of(workload, device)
    exact = exact_result(reference, inputs)

    def prepare(name: str) -> tuple[Run, Run]:
        model = networks.prepared(name, workload, networks.sharing_weights(reference))
        x, t, y = inputs
        return caller(model, (-x, t, y)), caller(model, inputs)

    rows = interleaved(workload, prepare, exact)
    return record_of(workload, rows, networks.flops_of(workload.network, workload.batch), ceilings)


def exact_result(model: nn.Module, inputs: networks.Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(*(each[:CHECKED] for each in inputs))


def caller(model: nn.Module, inputs: networks.Inputs) -> Run:
    @torch.no_grad()
    def run() -> torch.Tensor:
        with networks.autocast(inputs[0].device):
            return model(*inputs)

    return run


def interleaved(
    workload: NetworkWorkload, prepare: Callable[[str], tuple[Run, Run]], exact: torch.Tensor
) -> dict[str, dict]:
    """The rows of all contenders, which are timed in turns.

    prepare(name) returns two functions that call the contender. The first uses another input, to detect a contender
    that repeats its first result. The result of the second must start with `exact`.
    """
    rows, runs, limit = {}, {}, math.inf
    for name in workload.contenders:
        try:
            other, run = prepare(name)
            first_s = seconds(other)
            out, peak = with_peak_memory(run)
            error = relative_error(out[: len(exact)].float(), exact)
            rows[name] = {"error": error, "peak_gib": peak, "first_s": first_s}
            del out
            in_8_bit = name in networks.CONTENDERS and networks.CONTENDERS[name].in_8_bit  # SANA has others
            if not error <= (ERROR_IN_8_BIT if in_8_bit else limit):
                rows[name]["failure"] = "wrong"
            else:
                runs[name] = run
        except Exception as failure:
            rows[name] = {"failure": reason(failure)}
        if name == "eager":
            limit = max(2 * rows[name].get("error", math.inf), FP32_ERROR)
        release()
    for name, timing in measure(runs, rounds=3, at_least=1).items():
        rows[name] |= times_of(timing)
    return rows


def times_of(timing: Timing) -> dict[str, float]:
    return {"ms": timing.median, "ms_low": timing.low, "ms_high": timing.high}


def add_rates(rows: dict[str, dict], batch: int, flops: int, ceilings: Ceilings) -> None:
    """Adds images/s and MFU to rows. mfu: FLOPs of the unpatched model per time, as a fraction of the ceiling."""
    for row in rows.values():
        if "ms" in row:
            row["images_per_s"] = 1e3 * batch / row["ms"]
            row["mfu"] = flops / (row["ms"] * 1e9) / ceilings.tflops


def record_of(workload: NetworkWorkload, rows: dict[str, dict], flops: int, ceilings: Ceilings) -> dict:
    """The record of a workload."""
    add_rates(rows, workload.batch, flops, ceilings)
    return {
        "workload": workload.name, "network": workload.network, "work": workload.work, "batch": workload.batch,
        "checkpointed": workload.checkpointed, "flops": flops, "floor_ms": ceilings.floor(flops), "contenders": rows,
    }  # fmt: skip
