"""Time of the first call with a new shape: python -m benchmarks.first_call WORKLOAD CONTENDER, in a fresh process.

A workload is encoding, decoding, or a training step of an autoencoder.

Cold means that all caches on the disk (Triton, torch.compile, convolution plans) are empty. Warm means that a previous
process has filled them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from . import autoencoder_training, contenders
from .autoencoder_workloads import TrainingWorkload, training_workloads
from .timing import seconds
from .workloads import Workload, parse

ROOT = Path(__file__).parents[1]
CACHES = {  # variable of the environment → folder
    "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "DCAE_FAST_CACHE": "plans",
    "XDG_CACHE_HOME": "xdg",
}  # fmt: skip
AnyWorkload = Workload | TrainingWorkload


def benchmark(workload: Workload) -> dict:
    """The record of a workload: cold_s and warm_s of each contender in seconds, or the reason for a failure."""
    rows = {}
    for name in filter(contenders.is_available, workload.contenders):
        with tempfile.TemporaryDirectory() as caches:
            environment = {variable: f"{caches}/{folder}" for variable, folder in CACHES.items()}
            try:
                rows[name] = {key: in_fresh_process(workload, name, environment) for key in ("cold_s", "warm_s")}
            except subprocess.CalledProcessError as failure:
                rows[name] = {"failure": (failure.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return {"workload": workload.name, "contenders": rows}


def fill_caches(workloads: Sequence[AnyWorkload], processes: int) -> None:
    """Fills the disk cache of torch.compile for these workloads, with so many processes at a time.

    Only compiled code is cached. The choices that torch.compile and `patch` make by timing kernels are not: a process
    that has the GPU for itself repeats them later. Failures are ignored here; they occur again when the contender is
    called.
    """
    pairs = [(workload, name) for workload in workloads for name in workload.contenders if "torch.compile" in name]
    threads = len(os.sched_getaffinity(0)) // max(1, min(len(pairs), processes))
    with tempfile.TemporaryDirectory() as choices, ThreadPoolExecutor(processes) as pool:
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, threads)), "DCAE_FAST_CACHE": choices}
        for workload, name in pairs:
            pool.submit(in_fresh_process, workload, name, environment, "--compile-only")


def in_fresh_process(workload: AnyWorkload, contender: str, environment: dict[str, str], *options: str) -> float:
    """The seconds of the first call, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.first_call", workload.name, contender, *options]
    environment = os.environ | environment
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def first_call(workload: AnyWorkload, contender: str, device: torch.device) -> float:
    """Seconds of the first call, with the model already on the device and the libraries loaded."""
    if isinstance(workload, TrainingWorkload):
        in_training = autoencoder_training.prepared(contender, workload, device)
        images = autoencoder_training.images_of(workload, device)
        load_libraries(images)
        return seconds(autoencoder_training.stepper(contender, in_training, images))
    half, x = contenders.prepared(contender, workload, device)
    load_libraries(x)
    return seconds(contenders.caller(contender, half, x))


def load_libraries(like: torch.Tensor) -> None:
    """Loads cuDNN and cuBLAS by a convolution and a matrix product."""
    x = like.new_ones(1, 8, 8, 8)
    (F.conv2d(x, x).sum() + (x[0, 0] @ x[0, 0]).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", help="MODEL-DIRECTION-bBATCH-SIZE, or a workload of autoencoder-training")
    parser.add_argument("contender", choices=contenders.CONTENDERS | autoencoder_training.CONTENDERS)
    parser.add_argument("--compile-only", action="store_true", help="time few kernels, and cache no choices made so")
    options = parser.parse_args()
    if options.compile_only:
        from torch._inductor import config

        config.autotune_local_cache = False
        torch.backends.cudnn.benchmark_limit = 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training = {workload.name: workload for workload in training_workloads()}
    workload = training.get(options.workload) or parse(options.workload)
    print(first_call(workload, options.contender, device))


if __name__ == "__main__":
    main()
