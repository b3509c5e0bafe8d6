"""Time of the first call with a new shape: python -m benchmarks.first_call WORKLOAD CONTENDER, in a fresh process.

Cold means that all caches on the disk (Triton, torch.compile, convolution plans) are empty. Warm means that a previous
process has filled them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from . import contenders
from .timing import seconds
from .workloads import Workload, parse

ROOT = Path(__file__).parents[1]


def benchmark(workload: Workload) -> dict:
    """The record of a workload: cold_s and warm_s of each contender in seconds, or the reason for a failure."""
    rows = {}
    for name in filter(contenders.is_available, workload.contenders):
        with tempfile.TemporaryDirectory() as caches:
            folders = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "XDG_CACHE_HOME": "xdg"}
            environment = {variable: f"{caches}/{folder}" for variable, folder in folders.items()}
            try:
                rows[name] = {key: in_fresh_process(workload, name, environment) for key in ("cold_s", "warm_s")}
            except subprocess.CalledProcessError as failure:
                rows[name] = {"failure": (failure.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return {"workload": workload.name, "contenders": rows}


def fill_caches(workloads: list[Workload]) -> None:
    """Fills the disk cache of torch.compile for these workloads, with one process per CPU core.

    Only compiled code is cached. The choices that torch.compile makes by timing kernels are not: a process that has the
    GPU for itself repeats them later. Failures are ignored here; they occur again when the contender is called.
    """
    pairs = [(workload, name) for workload in workloads for name in workload.contenders if "torch.compile" in name]
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, os.cpu_count() // max(1, len(pairs))))}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for workload, name in pairs:
            pool.submit(in_fresh_process, workload, name, environment, "--compile-only")


def in_fresh_process(workload: Workload, contender: str, environment: dict[str, str], *options: str) -> float:
    """The seconds of the first call, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.first_call", workload.name, contender, *options]
    environment = os.environ | environment
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def first_call(workload: Workload, contender: str, device: torch.device) -> float:
    """Seconds of the first call, with the model already on the device and the libraries loaded."""
    half, x = contenders.prepared(contender, workload, device)
    load_libraries(x)
    return seconds(contenders.caller(contender, half, x))


def load_libraries(like: torch.Tensor) -> None:
    """Loads cuDNN and cuBLAS by a convolution and a matrix product."""
    x = like.new_ones(1, 8, 8, 8)
    (F.conv2d(x, x).sum() + (x[0, 0] @ x[0, 0]).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", type=parse, help="MODEL-DIRECTION-bBATCH-SIZE")
    parser.add_argument("contender", choices=contenders.CONTENDERS)
    parser.add_argument("--compile-only", action="store_true", help="do not cache choices made by timing kernels")
    options = parser.parse_args()
    if options.compile_only:
        from torch._inductor import config

        config.autotune_local_cache = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(first_call(options.workload, options.contender, device))


if __name__ == "__main__":
    main()
