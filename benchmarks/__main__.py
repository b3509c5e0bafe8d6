"""python -m benchmarks: runs all benchmarks on this machine; without a GPU, a rehearsal on small shapes."""

import argparse
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from . import (
    attention,
    autoencoder,
    autoencoder_loss_curve,
    autoencoder_training,
    contenders,
    first_call,
    loss_curve,
    networks,
    operators,
    pipeline,
    results,
    sampling,
    sana,
    shapes,
    tables,
    training,
    transformer,
)
from .autoencoder_workloads import TrainingWorkload, loss_workloads, training_workloads
from .ceilings import Ceilings, measure_ceilings
from .network_workloads import NetworkWorkload, network_workloads
from .sana_workloads import SanaWorkload, sana_workloads
from .workloads import ShapesWorkload, Workload, shapes_workloads, workloads

NETWORK_PARTS = {
    "transformer": transformer.benchmark,
    "training": training.benchmark,
    "sampling": sampling.benchmark,
    "loss-curve": loss_curve.benchmark,
}
PARTS = (
    "operators", "autoencoder", "memory", "first-call", "shapes", "autoencoder-training", "autoencoder-loss-curve",
    *NETWORK_PARTS, "sana", "attention", "pipeline",
)  # fmt: skip
TRAININGS_AT_ONCE = 5  # processes that compile training steps; each takes up to 25 GiB of the GPU
CONTENDERS = (
    list(contenders.CONTENDERS | autoencoder_training.CONTENDERS | networks.CONTENDERS | sana.PREPARE) + attention.NAMES
)
W = TypeVar("W", Workload, ShapesWorkload, TrainingWorkload, NetworkWorkload, SanaWorkload)


def chosen(workloads: list[W], only: Callable[[str], bool], names: Collection[str]) -> list[W]:
    """The workloads whose names pass `only`, each with the contenders in `names` and eager."""
    return [
        replace(workload, contenders=tuple(name for name in workload.contenders if name in {"eager", *names}))
        for workload in workloads
        if only(workload.name)
    ]


def records_of(
    part: str, only: Callable[[str], bool], names: Collection[str], device: torch.device, ceilings: Ceilings
) -> Iterator[dict]:
    """Measures a part of the benchmarks; yields each record, and a growing one several times. names: of contenders."""
    if part == "operators":
        yield from operators.benchmark(device, ceilings, only)
        return
    if part in NETWORK_PARTS:
        for workload in chosen(network_workloads(part), only, names):
            yield NETWORK_PARTS[part](workload, device, ceilings)
        return
    if part == "shapes":
        for workload in chosen(shapes_workloads(), only, {"eager channels-last", *names}):
            yield shapes.benchmark(workload, device)
        return
    if part == "attention":
        for workload in attention.WORKLOADS if device.type == "cuda" else attention.REHEARSAL:
            if only(workload.name):
                yield attention.benchmark(workload, device, ceilings, names)
        return
    if part == "sana":
        for workload in chosen(sana_workloads(), only, names):
            yield sana.benchmark(workload, device, ceilings)
        return
    if part == "autoencoder-training":
        selected = chosen(training_workloads(), only, names)
        first_call.fill_caches(selected, TRAININGS_AT_ONCE)
        for workload in selected:
            yield from autoencoder_training.records(workload, device, ceilings)
        return
    if part == "autoencoder-loss-curve":
        for workload in loss_workloads():
            if only(workload.name):
                yield autoencoder_loss_curve.benchmark(workload, device, ceilings)
        return
    if part == "pipeline":
        for each in pipeline.pipelines():
            if only(each.name):
                yield from pipeline.benchmark(each)
        return
    selected = chosen(workloads(part), only, names)
    if part == "autoencoder":
        first_call.fill_caches(selected, os.cpu_count())
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
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=CONTENDERS,
        metavar="NAME",
        help="run only eager and these contenders of each workload; the record replaces a record with more contenders"
        " in the same file. Not for operators, loss curves of autoencoders and pipeline",
    )
    parser.add_argument(
        "--out", type=Path, default=results.default_path(), help="JSON file for the results (default: %(default)s)"
    )
    options = parser.parse_args()

    def only(name: str) -> bool:
        return any(text in name for text in options.only)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    print(f"matrix product {ceilings.tflops:.0f} TFLOP/s in bf16, copy {ceilings.copy:.2f} TB/s", flush=True)
    found = False
    for part in options.part:
        for record in records_of(part, only, options.contenders, device, ceilings):
            found = True
            results.merge(options.out, part, record | {"ceilings": vars(ceilings)})
            print(tables.line(part, record), flush=True)
    if not found:
        parser.error(f"--only {' '.join(options.only)}: no workload or operator of these parts has such a name")
    print(f"results are in {options.out}")


if __name__ == "__main__":
    main()
