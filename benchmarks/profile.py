"""Profiles one call by kernel: python -m benchmarks.profile MODEL encode|decode --batch B --size S.

For a training step of an autoencoder: python -m benchmarks.profile MODEL training --batch B --size S. For a diffusion
transformer: python -m benchmarks.profile uvit-h-f64 forward|training --batch B. For diffusers' SANA: python -m
benchmarks.profile sana-1600m forward|training --batch B --size S. Kernels are grouped by kind. The times of
convolutions and matrix products are compared with the time that the unpatched model's FLOPs take at the rate of a large
matrix product. The record is added to the results file.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType

from dcae_fast.fast.patch import OPERATORS
from dcae_fast.models.zoo import autoencoder_names

from . import autoencoder, autoencoder_training, contenders, networks, results, sana, tables, training, transformer
from .autoencoder_workloads import RECIPES, TrainingWorkload
from .ceilings import Ceilings, measure_ceilings
from .network_workloads import NetworkWorkload
from .sana_workloads import SanaWorkload
from .timing import measure
from .workloads import DIRECTIONS, Workload

AnyWorkload = Workload | TrainingWorkload | NetworkWorkload | SanaWorkload
CALLS = 3  # profiled calls
KERNELS_LISTED = 12  # the longest kernels

# A kernel has the kind of the first pattern that matches its name.
KINDS = {
    "Inductor": r"^triton_",
    "this project's operators": "|".join({*OPERATORS} - {"linear", "mlp", "packed_attention"})
    + "|gelu_backward|quantize|_rows",
    "optimizer": r"multi_tensor_apply|adam",
    "batch norm": r"batch_?norm|\bbn_",
    "reduction": r"native::reduce_kernel|aten::sum",
    "copy": r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|transpose|catarray",
    "attention": r"attention|flash|fmha|softmax",
    "convolution": r"conv|fprop|winograd|cudnn",
    "matrix product": r"gemm|gemv|nvjet|cublas|cutlass|aten::\w*mm",
    "other": r"",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))


def kernels_of(run, device: torch.device) -> tuple[list[dict], float]:
    """The name, kind, ms and calls of every kernel in one call, longest first, and the span of all kernels.

    On a CPU, aten operators take the place of kernels. The span is the time from the start of the first kernel to the
    end of the last one, in milliseconds.
    """
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profiler:
        for _ in range(CALLS):
            run()
        if cuda:
            torch.cuda.synchronize()

    def is_kernel(event) -> bool:
        # annotations: of optimizer steps, which span kernels
        return (event.device_type == DeviceType.CUDA) == cuda and not event.is_user_annotation

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


def call_of(workload: AnyWorkload, contender: str, device: torch.device) -> Callable[[], object]:
    """The profiled call, as a function without arguments."""
    if isinstance(workload, Workload):
        return contenders.caller(contender, *contenders.prepared(contender, workload, device))
    if isinstance(workload, TrainingWorkload):
        in_training = autoencoder_training.prepared(contender, workload, device)
        images = autoencoder_training.images_of(workload, device)
        return autoencoder_training.stepper(contender, in_training, images)
    if isinstance(workload, SanaWorkload):
        return sana.call_of(workload, contender, device)
    inputs = networks.inputs_of(workload, device)
    model = training.prepared(contender, workload, device)
    return training.stepper(model, inputs) if workload.work == "training" else transformer.caller(model.eval(), inputs)


def floors_of(workload: AnyWorkload, ceilings: Ceilings) -> dict[str, float]:
    """The milliseconds that the unpatched model's FLOPs take at the ceiling, by kind of kernel.

    A training step of a transformer has three times the FLOPs of the forward, or four times with activation
    checkpointing, which SANA's training steps have.
    """
    kinds = {}
    if isinstance(workload, Workload):
        flops = autoencoder.flops_of(workload)
    elif isinstance(workload, TrainingWorkload):
        flops = autoencoder_training.flops_of(workload)
    else:
        if isinstance(workload, SanaWorkload):
            checkpointed, found = True, sana.flops_by_operator(workload)
        else:
            checkpointed, found = workload.checkpointed, networks.flops_by_operator(workload.network, workload.batch)
        passes = 3 + checkpointed if workload.work == "training" else 1
        flops = {op: passes * n for op, n in found.items()}
        kinds = {"attention": flops.pop("bmm", 0)}
    kinds["convolution"] = flops.pop("convolution", 0) + flops.pop("convolution_backward", 0)
    return {kind: ceilings.floor(n) for kind, n in (kinds | {"matrix product": sum(flops.values())}).items()}


def profile(workload: AnyWorkload, contender: str, device: torch.device, ceilings: Ceilings) -> dict:
    """The record: ms, calls and floor_ms (None if unknown) by kind of kernel; the longest kernels; idle_ms.

    idle_ms, the time without a running kernel, is the smaller of two estimates that are both too large: the time of an
    unprofiled call, which may run at a lower clock, and the span of the kernels, in which the profiler delays launches,
    each minus the sum of the kernels' times.
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
        "kinds": kinds, "kernels": [kernel | {"name": kernel["name"][:160]} for kernel in kernels[:KERNELS_LISTED]],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="an autoencoder; FAMILY-SIZE-LATENT of a transformer, as uvit-h-f64; sana-1600m")
    parser.add_argument("work", choices=(*DIRECTIONS, "forward", "training"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument(
        "--checkpointed", action="store_true", help="activation checkpointing of every block, in training"
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, default="full", help="what is trained of an autoencoder (default: %(default)s)"
    )
    parser.add_argument(
        "--contender", help='default: "patched channels-last" for autoencoders, "patched" for transformers'
    )
    parser.add_argument(
        "--out", type=Path, default=results.default_path(), help="JSON file for the results (default: %(default)s)"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_autoencoder = options.model in autoencoder_names()
    if is_autoencoder != (options.work in DIRECTIONS) and options.work != "training":
        parser.error(f"{options.model} {options.work}: autoencoders encode and decode, transformers have a forward")
    if options.work in DIRECTIONS:
        workload, known = Workload(options.model, options.work, options.batch, options.size), contenders.CONTENDERS
    elif is_autoencoder:
        workload = TrainingWorkload(options.model, options.recipe, options.batch, options.size)
        known = autoencoder_training.CONTENDERS
    elif options.model.startswith("sana-"):
        network = options.model.removeprefix("sana-")
        workload, known = SanaWorkload(network, options.work, options.batch, options.size, ()), sana.PREPARE
    else:
        workload = NetworkWorkload(options.model, options.work, options.batch, checkpointed=options.checkpointed)
        known = networks.CONTENDERS
    contender = options.contender or ("patched channels-last" if is_autoencoder else "patched")
    if contender not in known:
        parser.error(f"--contender {contender!r}; expected one of {', '.join(known)}")
    ceilings = measure_ceilings(device)
    record = profile(workload, contender, device, ceilings)
    results.merge(options.out, "profile", record | {"ceilings": vars(ceilings)})
    print(tables.profile_table(record), tables.kernel_table(record), sep="\n\n")


if __name__ == "__main__":
    main()
