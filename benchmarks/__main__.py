"""python -m benchmarks: runs all benchmarks on this machine; without a GPU, a rehearsal on small shapes."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import autoencoder, first_call, loss_curve, operators, pipeline, results, sampling, tables, training, transformer
from .ceilings import Ceilings, measure_ceilings
from .network_workloads import network_workloads
from .workloads import Workload, workloads

NETWORK_PARTS = {
    "transformer": transformer.benchmark,
    "training": training.benchmark,
    "sampling": sampling.benchmark,
    "loss-curve": loss_curve.benchmark,
}
PARTS = ("operators", "autoencoder", "memory", "first-call", *NETWORK_PARTS, "pipeline")


def records_of(part: str, only: Callable[[str], bool], device: torch.device, ceilings: Ceilings) -> Iterator[dict]:
    """Measures a part of the benchmarks; yields each record when it is complete."""
    if part == "operators":
        yield from operators.benchmark(device, ceilings, only)
        return
    if part in NETWORK_PARTS:
        for workload in network_workloads(part):
            if only(workload.name):
                yield NETWORK_PARTS[part](workload, device, ceilings)
        return
    if part == "pipeline":
        for each in pipeline.pipelines():
            if only(each.name):
                yield from pipeline.benchmark(each)
        return
    selected: list[Workload] = [workload for workload in workloads(part) if only(workload.name)]
    if part == "autoencoder":
        first_call.fill_caches(selected)
    for workload in selected:
        if part == "autoencoder":
            yield autoencoder.benchmark(workload, device, ceilings)
        elif part == "memory":
            yield autoencoder.benchmark(workload, device, ceilings, reference_tf32=True, rounds=2, at_least=1)
        else:
            yield first_call.benchmark(workload)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS, help="parts to run; by default all")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[""],
        help="run only workloads and operators whose names contain one of these texts",
    )
    parser.add_argument(
        "--out", type=Path, default=results.default_path(), help="JSON file for the results (default: %(default)s)"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    print(f"matrix product {ceilings.tflops:.0f} TFLOP/s in bf16, copy {ceilings.copy:.2f} TB/s", flush=True)
    for part in options.part:
        for record in records_of(part, lambda name: any(text in name for text in options.only), device, ceilings):
            results.merge(options.out, part, record | {"ceilings": vars(ceilings)})
            print(tables.line(part, record), flush=True)
    print(f"results are in {options.out}")


if __name__ == "__main__":
    main()
