"""python -m benchmarks.products_8bit: linear layers of UViT-H in bf16, float8 and int8, and what rounds their inputs.

Each contender runs back to back for about a second, so that the power limit holds the clock as in real work. One line
for each: time, TFLOP/s or TB/s, the time relative to bf16, and the relative error of the result against fp32. The
records go into the same file as those of `python -m benchmarks`, as the part "products-8bit".

float8 and int8 are `ops.linear_rows`; "float8, PyTorch" is torch._scaled_mm with a separate sum for the residual.
Operands are rounded before; the rounding is timed by itself, for both types by the same kernels.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dcae_fast import ops
from dcae_fast.ops._private import scaled_product

from . import results
from .autoencoder import relative_error
from .ceilings import Ceilings, measure_ceilings
from .timing import graphed

ROWS = {  # tokens of a batch
    "b2048 f64": 2048 * 66, "b512 f32": 512 * 258, "16 images, guided, f64": 32 * 66, "1 image, guided, f64": 2 * 66,
}  # fmt: skip
LAYERS = {  # name → input and output channels, whether a residual is added
    "qkv": (1152, 3456, False),
    "projection": (1152, 1152, True),
    "fc1": (1152, 4608, False),
    "fc2": (4608, 1152, True),
    "long skip": (2304, 1152, False),
}
WIDTH, CALLS = 1152, 10  # calls in a captured graph
Runs = dict[str, Callable[[], torch.Tensor]]


def sustained(run: Callable[[], object], seconds: float) -> float:
    """Milliseconds of a call, among calls back to back for about so many seconds. Once on a CPU.

    The calls are captured as a CUDA graph, since small ones take longer on the host than on the GPU.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def timed(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    run = graphed(run, CALLS)
    run()
    return timed(max(3, round(1e3 * seconds / timed(3)))) / CALLS


def layer_runs(rows: int, depth: int, columns: int, has_residual: bool, device: torch.device) -> tuple[Runs, Callable]:
    """The contenders of a linear layer, and a function without arguments that gives the result in fp32."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, weight, bias = random(rows, depth), random(columns, depth) / depth**0.5, random(columns)
    residual = random(rows, columns) if has_residual else None
    float8 = *ops.quantize_rows(x), *ops.quantize_rows(weight)
    int8 = *ops.quantize_rows(x, dtype=torch.int8), *ops.quantize_rows(weight, dtype=torch.int8)

    def by_torch() -> torch.Tensor:
        q, scale, q_weight, weight_scale = float8
        y = scaled_product(
            q, q_weight.T, scale, weight_scale.T, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return y if residual is None else y + residual

    runs = {
        "bf16": lambda: ops.linear(x, weight, bias, residual),
        "float8": lambda: ops.linear_rows(*float8, bias, residual),
        "float8, exact sums": lambda: ops.linear_rows(*float8, bias, residual, fast=False),
        "int8": lambda: ops.linear_rows(*int8, bias, residual),
    }
    if device.type == "cuda":
        runs["float8, PyTorch"] = by_torch
    exact = residual if residual is None else residual.float()
    return runs, lambda: ops.linear(x.float(), weight.float(), bias.float(), exact)


def layers(rows: dict[str, int], device: torch.device, seconds: float) -> Iterator[dict]:
    """Records of linear layers."""
    for batch, count in rows.items():
        for name, (depth, columns, has_residual) in LAYERS.items():
            runs, exact = layer_runs(count, depth, columns, has_residual, device)
            flops, exact = 2 * count * depth * columns, exact()
            for contender, run in runs.items():
                error, ms = relative_error(run(), exact), sustained(run, seconds)
                yield {
                    "workload": f"{name}, {batch}", "contender": contender, "shape": [count, depth, columns],
                    "ms": ms, "tflops": flops / ms / 1e9, "error": error,
                }  # fmt: skip


def producer_runs(images: int, tokens: int, device: torch.device) -> Runs:
    """The kernels that write inputs of linear layers, in bf16 and in 8 bit."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, branch, hidden = (random(images, tokens, width) for width in (WIDTH, WIDTH, 4 * WIDTH))
    scale, shift, gate = (random(images, WIDTH) for _ in range(3))
    affine, weight = (random(WIDTH), random(WIDTH)), random(4 * WIDTH, WIDTH)
    runs: Runs = {
        "layer norm, bf16": lambda: ops.layer_norm(x, *affine, 1e-5)[1],
        "gated sum, norm and adaLN, bf16": lambda: ops.layer_norm(x, scale, shift, 1e-5, branch, gate),
        "concatenation, bf16": lambda: ops.concatenate(x, branch, torch.bfloat16),
    }
    for dtype in (torch.float8_e4m3fn, torch.int8):
        named = str(dtype).removeprefix("torch.")
        runs |= {
            f"layer norm, {named}": lambda dtype=dtype: ops.layer_norm_rows(x, *affine, 1e-5, dtype=dtype)[1:],
            f"gated sum, norm and adaLN, {named}": lambda dtype=dtype: ops.layer_norm_rows(
                x, scale, shift, 1e-5, branch, gate, dtype
            ),
            f"concatenation, {named}": lambda dtype=dtype: ops.concatenate_rows(x, branch, dtype),
            f"rounding, {named}": lambda dtype=dtype: ops.quantize_rows(x, dtype=dtype),
            f"gelu and rounding, {named}": lambda dtype=dtype: ops.quantize_rows(hidden, "gelu", dtype),
            f"rounding of a weight, {named}": lambda dtype=dtype: ops.quantize_rows(weight, dtype=dtype),
        }
    read = {"layer": [x], "gated": [x, branch], "concatenation": [x, branch], "rounding": [x], "gelu": [hidden]}
    return {name: (run, weight.nbytes if "weight" in name else _bytes(read, name)) for name, run in runs.items()}


def _bytes(read: dict[str, list[torch.Tensor]], name: str) -> int:
    """What a producer reads, without vectors."""
    return sum(tensor.nbytes for tensor in read[name.replace(",", "").split()[0]])


def producers(device: torch.device, seconds: float, ceilings: Ceilings, small: bool) -> Iterator[dict]:
    """Records of kernels that are limited by memory."""
    images, tokens = (2, 5) if small else (2048, 66)
    for name, (run, read) in producer_runs(images, tokens, device).items():
        results_of = run()
        written = sum(tensor.nbytes for tensor in (results_of if isinstance(results_of, tuple) else (results_of,)))
        ms = sustained(run, seconds)
        yield {
            "workload": "producers, b2048 f64", "contender": name, "ms": ms,
            "terabytes": (read + written) / ms / 1e9, "floor_ms": ceilings.floor(0, read + written),
        }  # fmt: skip


def line(record: dict, bf16: dict[str, float]) -> str:
    rate = f"{record['tflops']:7.0f} TFLOP/s" if "tflops" in record else f"{record['terabytes']:7.2f} TB/s"
    notes = f"  error {record['error']:.1e}" if "error" in record else f"  floor {record['floor_ms']:.3f} ms"
    if record["workload"] in bf16:
        notes += f"  {bf16[record['workload']] / record['ms']:.2f}x bf16"
    return f"{record['workload']:32} {record['contender']:36} {record['ms']:8.3f} ms {rate}{notes}"


def all_records(device: torch.device, seconds: float, ceilings: Ceilings, small: bool) -> Iterator[dict]:
    yield from producers(device, seconds, ceilings, small)
    yield from layers({name: 32 if small else count for name, count in ROWS.items()}, device, seconds)


@torch.inference_mode()
def main(
    description: str = __doc__,
    records_of: Callable[[torch.device, float, Ceilings, bool], Iterator[dict]] = all_records,
) -> None:
    """Measures records and prints a line for each. records_of(device, seconds, ceilings, small) yields them."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of work for each contender (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=results.default_path(), help="file of results")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small, ceilings, bf16 = device.type != "cuda", measure_ceilings(device), {}
    for record in records_of(device, options.seconds, ceilings, small):
        if record["contender"] == "bf16":
            bf16[record["workload"]] = record["ms"]
        results.merge(options.out, "products-8bit", record | {"ceilings": vars(ceilings)})
        print(line(record, bf16), flush=True)


if __name__ == "__main__":
    main()
