"""Benchmarks one direction of an autoencoder: checks each contender against fp32, then times the correct ones."""

import gc
import math
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dcae_fast.models.autoencoder import DCAE

from . import contenders
from .ceilings import Ceilings
from .timing import measure, seconds, with_peak_memory
from .workloads import Workload

FP32_ERROR = 1e-4  # a contender with a smaller error is never wrong, even if eager's error is much smaller
ERROR_IN_8_BIT = 0.3  # of random weights, the most before an 8-bit contender is wrong


def benchmark(
    workload: Workload, device: torch.device, ceilings: Ceilings, reference_tf32: bool = False, **repetitions
) -> dict:
    """The record of a workload: error, peak memory and time of each contender, or the reason why it has no time.

    A contender is wrong if its error is more than twice eager's, in 8 bit more than ERROR_IN_8_BIT. reference_tf32:
    compute the exact result in TF32, for workloads where fp32 would take too long; TF32 rounds much less than bf16.
    repetitions: arguments of `timing.measure`.
    """
    torch.compiler.reset()  # drops the code compiled for the previous workload
    reference = contenders.random_model(workload.model, device)
    half = contenders.half_of(reference, workload)
    exact = exact_result(half, contenders.example(workload, reference, device), reference_tf32)
    rows, runs, limit = {}, {}, math.inf
    for name in filter(contenders.is_available, workload.contenders):
        rows[name], runs[name] = trial(name, workload, device, exact, limit)
        if name == "eager":
            limit = max(2 * (rows[name].get("error") or 0), FP32_ERROR)
    timed = {name: run for name, run in runs.items() if "failure" not in rows[name]}
    for name, timing in measure(timed, **repetitions).items():
        rows[name] |= {"ms": timing.median, "ms_low": timing.low, "ms_high": timing.high}
    flops = sum(flops_of(workload).values())
    return {
        "workload": workload.name, "model": workload.model, "direction": workload.direction, "batch": workload.batch,
        "size": workload.size, "flops": flops, "floor_ms": ceilings.floor(flops), "contenders": rows,
    }  # fmt: skip


def trial(
    name: str, workload: Workload, device: torch.device, exact: torch.Tensor | None, limit: float
) -> tuple[dict, Callable[[], torch.Tensor] | None]:
    """The row of a contender (error, peak memory, seconds of the first call), and a function that calls the contender.

    A contender that must not be timed has a "failure" in its row, with the reason. The first call gets another input,
    to detect a contender that repeats its first result. Without an exact result the error is None: not checked.
    """
    run = None
    try:
        half, x = contenders.prepared(name, workload, device)
        run = contenders.caller(name, half, x)
        first_s = seconds(contenders.caller(name, half, -x))
        out, peak = with_peak_memory(run)
        error = None if exact is None else relative_error(out, exact)
        row = {"error": error, "peak_gib": peak, "first_s": first_s}
        limit = ERROR_IN_8_BIT if contenders.CONTENDERS[name].in_8_bit else limit
        if error is not None and not error <= limit:
            row["failure"] = "wrong"
    except Exception as failure:
        row = {"failure": reason(failure)}
    release()
    return row, run


def reason(failure: Exception) -> str:
    """The failure in one short line."""
    message = str(failure).strip().partition("\n")[0]
    return "out of memory" if "out of memory" in message.lower() else f"{type(failure).__name__}: {message}"[:200]


def release() -> None:
    """Returns unused cached memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """‖got - exact‖ / ‖exact‖"""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@torch.inference_mode()
def exact_result(half: nn.Module, x: torch.Tensor, tf32: bool) -> torch.Tensor | None:
    """half(x), computed image by image; None if the device runs out of memory."""
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            return torch.cat([half(image[None]) for image in x])
    except RuntimeError:
        return None
    finally:
        release()


def flops_of(workload: Workload) -> dict[str, int]:
    """FLOPs of the unpatched model by operator ("convolution", "bmm", ...), counted on fake tensors."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = DCAE.from_name(workload.model).eval()
        contenders.half_of(model, workload)(torch.empty(contenders.input_shape(workload, model)))
    return {op.__name__: flops for op, flops in counter.get_flop_counts()["Global"].items()}
