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


def workloads_of(part: str) -> list:
    """The workloads of a part whose contenders can be chosen; none of other parts."""
    if part in NETWORK_PARTS:
        return network_workloads(part)
    if part in ("operators", "attention", "autoencoder-loss-curve", "pipeline"):
        return []
    lists = {"shapes": shapes_workloads, "sana": sana_workloads, "autoencoder-training": training_workloads}
    return lists[part]() if part in lists else workloads(part)


def contenders_of(part: str, only: Callable[[str], bool]) -> set[str]:
    """The names of all contenders of the workloads whose names pass `only`; none if they cannot be chosen."""
    names = {name for workload in workloads_of(part) if only(workload.name) for name in workload.contenders}
    return {*attention.NAMES} if part == "attention" else names


def chosen(workloads: list[W], only: Callable[[str], bool], names: Collection[str], baseline: str = "eager") -> list[W]:
    """The workloads whose names pass `only`, each with the contenders in `names` and the baseline.

    A workload that has none of the contenders in `names` is left out, and named on the terminal.
    """
    found = []
    for workload in filter(lambda workload: only(workload.name), workloads):
        if not set(names).isdisjoint(workload.contenders):
            kept = tuple(name for name in workload.contenders if name in {baseline, *names})
            found.append(replace(workload, contenders=kept))
        else:
            print(f"{workload.name} is left out: it has none of these contenders", flush=True)
    return found


def records_of(
    part: str, only: Callable[[str], bool], names: Collection[str], device: torch.device, ceilings: Ceilings
) -> Iterator[dict]:
    """Measures a part of the benchmarks; yields each record, and a growing one several times. names: of contenders."""
    if part == "operators":
        yield from operators.benchmark(device, ceilings, only)
        return
    if part == "attention":
        for workload in attention.WORKLOADS if device.type == "cuda" else attention.REHEARSAL:
            if only(workload.name):
                yield attention.benchmark(workload, device, ceilings, names)
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
    selected = chosen(workloads_of(part), only, names, "eager channels-last" if part == "shapes" else "eager")
    if part == "autoencoder-training":
        first_call.fill_caches(selected, TRAININGS_AT_ONCE)
    elif part == "autoencoder":
        first_call.fill_caches(selected, os.cpu_count())
    for workload in selected:
        yield from records_of_workload(part, workload, device, ceilings)


def records_of_workload(part: str, workload: W, device: torch.device, ceilings: Ceilings) -> Iterator[dict]:
    """`records_of`, for one workload with the contenders that were chosen."""
    if part in NETWORK_PARTS:
        yield NETWORK_PARTS[part](workload, device, ceilings)
    elif part == "shapes":
        yield shapes.benchmark(workload, device)
    elif part == "sana":
        yield sana.benchmark(workload, device, ceilings)
    elif part == "autoencoder-training":
        yield from autoencoder_training.records(workload, device, ceilings)
    elif part == "autoencoder":
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
        help="run only eager and these contenders, and only workloads that have one of them; the record replaces a"
        " record with more contenders in the same file. Not for operators, loss curves of autoencoders and pipeline",
    )
    parser.add_argument(
        "--out", type=Path, default=results.default_path(), help="JSON file for the results (default: %(default)s)"
    )
    options = parser.parse_args()

    def only(name: str) -> bool:
        return any(text in name for text in options.only)

    for part in options.part:
        names = contenders_of(part, only)
        if names and names.isdisjoint(options.contenders):
            parser.error(f"--contenders {' '.join(options.contenders)}: {part} has {', '.join(sorted(names))}")
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
