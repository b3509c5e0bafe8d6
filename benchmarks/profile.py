"""Where the time of one call goes: python -m benchmarks.profile MODEL encode|decode --batch B --size S.

Kernels are grouped by kind, and convolutions and matrix products set beside the plain model's arithmetic at the rate of
a large product. The record goes to the results file.
"""

import argparse
import re
from pathlib import Path

import torch
from torch.autograd import DeviceType

from dcae_fast.fast.patch import OPERATORS

from . import contenders, results, tables
from .autoencoder import flops_of
from .ceilings import Ceilings, measure_ceilings
from .timing import measure
from .workloads import DIRECTIONS, Workload

CALLS = 3  # profiled
LONGEST = 12  # kernels named one by one

# The first pattern that a kernel's name matches tells its kind.
KINDS = {
    "Inductor": r"^triton_",
    "this project's operators": "|".join(OPERATORS),
    "copy": r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|transpose|catarray",
    "convolution": r"conv|fprop|winograd|cudnn",
    "matrix product": r"gemm|gemv|nvjet|cublas|cutlass|aten::\w*mm",
    "other": r"",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def kernels_of(run, device: torch.device) -> list[dict]:
    """name, kind, ms and calls of every kernel in one call, the longest first; on a CPU of every aten operator."""
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
        for _ in range(CALLS):
            run()
        if cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CUDA) == cuda:
            microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels.append({
                "name": event.key, "kind": kind_of(event.key), "ms": microseconds / 1e3 / CALLS,
                "calls": event.count / CALLS,
            })  # fmt: skip
    return sorted(kernels, key=lambda kernel: -kernel["ms"])


def profile(workload: Workload, contender: str, device: torch.device, ceilings: Ceilings) -> dict:
    """The record: by kind ms, calls and floor_ms (None where it is not known); the longest kernels; idle_ms."""
    half, x = contenders.prepared(contender, workload, device)
    run = contenders.caller(half, x)
    for _ in range(3):
        run()
    ms = measure({contender: run})[contender].median
    kernels = kernels_of(run, device)
    flops = flops_of(workload)
    convolution = flops.pop("convolution", 0)
    floors = {"convolution": ceilings.floor(convolution), "matrix product": ceilings.floor(sum(flops.values()))}
    kinds = {}
    for kernel in kernels:
        kind = kinds.setdefault(kernel["kind"], {"ms": 0.0, "calls": 0.0, "floor_ms": floors.get(kernel["kind"])})
        kind["ms"] += kernel["ms"]
        kind["calls"] += kernel["calls"]
    busy = sum(kernel["ms"] for kernel in kernels)
    return {
        "workload": workload.name, "contender": contender, "ms": ms, "idle_ms": max(ms - busy, 0.0),
        "kinds": kinds, "kernels": [kernel | {"name": kernel["name"][:160]} for kernel in kernels[:LONGEST]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("direction", choices=DIRECTIONS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--contender", choices=contenders.CONTENDERS, default="patched channels-last")
    parser.add_argument("--out", type=Path, default=results.default_path(), help="the JSON file (%(default)s)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workload = Workload(options.model, options.direction, options.batch, options.size)
    ceilings = measure_ceilings(device)
    record = profile(workload, options.contender, device, ceilings)
    results.merge(options.out, "profile", record | {"ceilings": vars(ceilings)})
    print(tables.profile_table(record), tables.kernel_table(record), sep="\n\n")


if __name__ == "__main__":
    main()
