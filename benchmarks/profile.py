"""Where the time of one call goes: python -m benchmarks.profile MODEL encode|decode --batch B --size S, of a diffusion
transformer python -m benchmarks.profile uvit-h-f64 forward|training --batch B.

Kernels are grouped by kind, and convolutions and matrix products set beside the plain model's arithmetic at the rate of
a large product. The record goes to the results file.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType

from dcae_fast.fast.patch import OPERATORS

from . import contenders, networks, results, tables, training, transformer
from .autoencoder import flops_of
from .ceilings import Ceilings, measure_ceilings
from .network_workloads import NetworkWorkload
from .timing import measure
from .workloads import DIRECTIONS, Workload

CALLS = 3  # profiled
LONGEST = 12  # kernels named one by one

# The first pattern that a kernel's name matches tells its kind.
KINDS = {
    "Inductor": r"^triton_",
    "this project's operators": "|".join({*OPERATORS} - {"linear", "mlp", "packed_attention"}) + "|gelu_backward",
    "copy": r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|transpose|catarray",
    "attention": r"attention|flash|fmha|softmax",
    "convolution": r"conv|fprop|winograd|cudnn",
    "matrix product": r"gemm|gemv|nvjet|cublas|cutlass|aten::\w*mm",
    "other": r"",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def kernels_of(run, device: torch.device) -> tuple[list[dict], float]:
    """name, kind, ms and calls of every kernel in one call, the longest first; on a CPU of every aten operator. And the
    milliseconds from the first kernel's start to the last one's end.
    """
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
        for _ in range(CALLS):
            run()
        if cuda:
            torch.cuda.synchronize()

    def is_kernel(event) -> bool:
        return (event.device_type == DeviceType.CUDA) == cuda and not event.is_user_annotation  # of an optimizer's step

    kernels = []
    for event in filter(is_kernel, profiler.key_averages()):
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        kernels.append({
            "name": event.key, "kind": kind_of(event.key), "ms": microseconds / 1e3 / CALLS,
            "calls": event.count / CALLS,
        })  # fmt: skip
    ranges = [event.time_range for event in filter(is_kernel, profiler.events())]
    span = max(each.end for each in ranges) - min(each.start for each in ranges)
    return sorted(kernels, key=lambda kernel: -kernel["ms"]), span / 1e3 / CALLS


def call_of(workload: Workload | NetworkWorkload, contender: str, device: torch.device) -> Callable[[], object]:
    """What is profiled, as a function without arguments."""
    if isinstance(workload, Workload):
        return contenders.caller(contender, *contenders.prepared(contender, workload, device))
    inputs = networks.inputs_of(workload, device)
    model = training.prepared(contender, workload, device)
    return training.stepper(model, inputs) if workload.work == "training" else transformer.caller(model.eval(), inputs)


def floors_of(workload: Workload | NetworkWorkload, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds that the plain model's arithmetic takes at the ceiling, by kind of kernel; in training three times
    the forward's, four times where blocks compute theirs again.
    """
    if isinstance(workload, Workload):
        flops, kinds = flops_of(workload), {}
    else:
        passes = 3 + workload.checkpointed if workload.work == "training" else 1
        flops = {op: passes * n for op, n in networks.flops_by_operator(workload.network, workload.batch).items()}
        kinds = {"attention": flops.pop("bmm", 0)}
    kinds["convolution"] = flops.pop("convolution", 0)
    return {kind: ceilings.floor(n) for kind, n in (kinds | {"matrix product": sum(flops.values())}).items()}


def profile(workload: Workload | NetworkWorkload, contender: str, device: torch.device, ceilings: Ceilings) -> dict:
    """The record: by kind ms, calls and floor_ms (None where it is not known); the longest kernels; idle_ms.

    The kernels' time is short of a timed call's, which may run hotter and slower, and of their span, in which launches
    wait for the profiler: of both ways to say how long none runs, the GPU's idle time is the lesser.
    """
    run = call_of(workload, contender, device)
    for _ in range(3):
        run()
    ms = measure({contender: run})[contender].median
    kernels, span = kernels_of(run, device)
    floors = floors_of(workload, ceilings)
    kinds = {}
    for kernel in kernels:
        kind = kinds.setdefault(kernel["kind"], {"ms": 0.0, "calls": 0.0, "floor_ms": floors.get(kernel["kind"])})
        kind["ms"] += kernel["ms"]
        kind["calls"] += kernel["calls"]
    busy = sum(kernel["ms"] for kernel in kernels)
    return {
        "workload": workload.name, "contender": contender, "ms": ms, "idle_ms": max(min(ms, span) - busy, 0.0),
        "kinds": kinds, "kernels": [kernel | {"name": kernel["name"][:160]} for kernel in kernels[:LONGEST]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("work", choices=(*DIRECTIONS, "forward", "training"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--checkpointed", action="store_true", help="every block, in training")
    parser.add_argument("--contender", help="by default a patched one")
    parser.add_argument("--out", type=Path, default=results.default_path(), help="the JSON file (%(default)s)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.work in DIRECTIONS:
        workload, known = Workload(options.model, options.work, options.batch, options.size), contenders.CONTENDERS
    else:
        workload = NetworkWorkload(options.model, options.work, options.batch, checkpointed=options.checkpointed)
        known = networks.CONTENDERS
    contender = options.contender or ("patched channels-last" if options.work in DIRECTIONS else "patched")
    if contender not in known:
        parser.error(f"--contender {contender!r}; expected one of {', '.join(known)}")
    ceilings = measure_ceilings(device)
    record = profile(workload, contender, device, ceilings)
    results.merge(options.out, "profile", record | {"ceilings": vars(ceilings)})
    print(tables.profile_table(record), tables.kernel_table(record), sep="\n\n")


if __name__ == "__main__":
    main()
