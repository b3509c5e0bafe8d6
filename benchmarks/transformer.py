"""Forward of a diffusion transformer, and what trials of the further parts share.

A contender's first samples are checked against fp32: the samples of a batch do not depend on each other.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from . import networks
from .autoencoder import FP32_ERROR, reason, relative_error, release
from .ceilings import Ceilings
from .network_workloads import NetworkWorkload
from .timing import Timing, measure, seconds, with_peak_memory

CHECKED = 4  # samples
Run = Callable[[], torch.Tensor]


def benchmark(workload: NetworkWorkload, device: torch.device, ceilings: Ceilings) -> dict:
    """The record of a workload: of each contender error, peak memory, time, images/s and MFU, or why it has none."""
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
    """The rows of all contenders, which take turns.

    prepare(name): two calls of the same kind, the former on another input, so that a contender which repeats what it
    computed before is found out; the result of the latter starts like `exact`.
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
            if not rows[name]["error"] <= limit:
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


def record_of(workload: NetworkWorkload, rows: dict[str, dict], flops: int, ceilings: Ceilings) -> dict:
    """mfu: the plain network's arithmetic in the time of a call, as a share of the measured ceiling."""
    for row in rows.values():
        if "ms" in row:
            row["images_per_s"] = 1e3 * workload.batch / row["ms"]
            row["mfu"] = flops / (row["ms"] * 1e9) / ceilings.tflops
    return {
        "workload": workload.name, "network": workload.network, "work": workload.work, "batch": workload.batch,
        "checkpointed": workload.checkpointed, "flops": flops, "floor_ms": ceilings.floor(flops), "contenders": rows,
    }  # fmt: skip
