"""python -m benchmarks: ceilings, operators and autoencoders on this machine; a rehearsal where there is no GPU."""

import argparse
from pathlib import Path

import torch

from . import autoencoder, operators, report
from .ceilings import measure_ceilings


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["dc-ae-f32c32-in-1.0" if cuda else "dc-ae-tiny"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8] if cuda else [1])
    parser.add_argument("--size", type=int, default=512 if cuda else 64)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes")
    parser.add_argument("--no-diffusers", action="store_true")
    parser.add_argument("--out", type=Path, help="the JSON file; benchmarks/results/<gpu>.json by default")
    options = parser.parse_args()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32

    results = report.stamp()
    ceilings = measure_ceilings(device)
    results["ceilings"] = vars(ceilings)
    print(f"{results['gpu'] or 'CPU'}: {ceilings.tflops:.0f} TFLOP/s bf16, copy {ceilings.copy:.2f} TB/s", flush=True)
    results["operators"] = list(operators.benchmark(device, ceilings, shrink=1 if cuda else 16))
    print(report.operator_table(results["operators"]), flush=True)
    results["autoencoder"] = []
    for name in options.models:
        rows = autoencoder.benchmark(
            name, options.batches, options.size, dtype, device, ceilings,
            with_diffusers=not options.no_diffusers, compiled=not options.no_compile,
        )  # fmt: skip
        results["autoencoder"] += rows
    print(report.autoencoder_table(results["autoencoder"]))
    print(report.quality_table(results["autoencoder"]))
    gpu = (results["gpu"] or "cpu").replace(" ", "_").lower()
    path = options.out or report.RESULTS / f"{gpu}.json"
    report.write(results, path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
