"""python -m benchmarks.gradients_8bit: what training in 8 bit adds to a backward pass, for the MLP of UViT-H.

As `python -m benchmarks.products_8bit`: first the kernels that round gradients, limited by memory, then the products
for the gradients of fc1 in bf16 and in float8. The records go into the same part, "products-8bit".
"""

from collections.abc import Iterator

import torch

from dcae_fast.ops.gelu_backward_rows import gelu_backward_rows_op
from dcae_fast.ops.gradient_rows import gradient_rows_op
from dcae_fast.ops.linear import linear_backward_input_op, linear_backward_weight_op
from dcae_fast.ops.linear_fp8 import FORMAT, GRADIENT
from dcae_fast.ops.linear_rows import linear_rows_op
from dcae_fast.ops.mlp import gelu_backward_op
from dcae_fast.ops.quantize_columns import quantize_columns_op, transpose_rows_op
from dcae_fast.ops.quantize_rows import layer_norm_and_rows_op, quantize_rows_op

from . import products_8bit
from .autoencoder import relative_error
from .ceilings import Ceilings
from .products_8bit import WIDTH, Runs, sustained

BATCH = "training, b1024 f64"
ROWS = 1024 * 66
HIDDEN = 4 * WIDTH


def random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def roundings(rows: int, device: torch.device) -> dict[str, tuple]:
    """Name → a function without arguments, and the bytes that it reads."""
    wide = random(1, rows, WIDTH, device=device, dtype=torch.float32)
    dg, h = (random(rows, HIDDEN, device=device) for _ in range(2))
    weight = random(HIDDEN, WIDTH, device=device, dtype=torch.float32)
    vector, h_rows = random(WIDTH, device=device), quantize_rows_op(h, "none", FORMAT)
    norm = wide, vector, vector, 1e-5, None, None
    gelu, half = (dg, h, "gelu"), torch.bfloat16
    return {
        "norm of fp32, bf16 and rows": (lambda: layer_norm_and_rows_op(*norm, half, FORMAT)[1:], wide.nbytes),
        "gradient of fp32, bf16 and rows": (
            lambda: gradient_rows_op(wide, half, GRADIENT, True, False), wide.nbytes,
        ),
        "gradient of fp32, rows and sum": (
            lambda: gradient_rows_op(wide, half, GRADIENT, False, True), wide.nbytes,
        ),
        "gelu gradient, bf16": (lambda: gelu_backward_op(*gelu, True), 2 * h.nbytes),
        "gelu gradient, bf16 and rows": (
            lambda: gelu_backward_rows_op(*gelu, GRADIENT, False, True), 2 * h.nbytes,
        ),
        "gelu gradient, rows": (lambda: gelu_backward_rows_op(*gelu, GRADIENT, True, True), 2 * h.nbytes),
        "transposed rows": (lambda: transpose_rows_op(*h_rows), h_rows[0].nbytes),
        "weight along its columns": (lambda: quantize_columns_op(weight, FORMAT), 2 * weight.nbytes),
    }  # fmt: skip


def products(rows: int, device: torch.device) -> dict[str, tuple[Runs, torch.Tensor]]:
    """The products for the gradients of fc1, and the results in fp32."""
    x, dy = random(rows, WIDTH, device=device), random(rows, HIDDEN, device=device)
    weight = random(HIDDEN, WIDTH, device=device, dtype=torch.float32)
    half = weight.bfloat16()
    x_rows, dy_rows = quantize_rows_op(x, "none", FORMAT), quantize_rows_op(dy, "none", GRADIENT)
    columns = quantize_columns_op(weight, FORMAT)
    transposed = *transpose_rows_op(*dy_rows), *transpose_rows_op(*x_rows)
    options = None, None

    def of_input(fast: bool) -> torch.Tensor:
        return linear_rows_op(*dy_rows, *columns, *options, torch.bfloat16, fast)

    def of_weight(fast: bool) -> torch.Tensor:
        return linear_rows_op(*transposed, *options, torch.float32, fast)

    return {
        "fc1, gradient of the input": (
            {
                "bf16": lambda: linear_backward_input_op(dy, half),
                "float8, exact sums": lambda: of_input(False),
                "float8": lambda: of_input(True),
            },
            dy.float() @ weight,
        ),
        "fc1, gradient of the weight": (
            {
                "bf16": lambda: linear_backward_weight_op(dy, x, True, torch.float32)[0],
                "float8, exact sums": lambda: of_weight(False),
                "float8": lambda: of_weight(True),
            },
            dy.float().T @ x.float(),
        ),
    }


def records(device: torch.device, seconds: float, ceilings: Ceilings, small: bool) -> Iterator[dict]:
    rows = 48 if small else ROWS
    for name, (run, read) in roundings(rows, device).items():
        found = run()
        written = sum(tensor.nbytes for tensor in found)
        ms = sustained(run, seconds)
        yield {
            "workload": BATCH, "contender": name, "ms": ms, "terabytes": (read + written) / ms / 1e9,
            "floor_ms": ceilings.floor(0, read + written),
        }  # fmt: skip
    for name, (runs, exact) in products(rows, device).items():
        for contender, run in runs.items():
            error, ms = relative_error(run().float(), exact), sustained(run, seconds)
            yield {
                "workload": f"{name}, {BATCH}", "contender": contender, "ms": ms,
                "tflops": 2 * rows * WIDTH * HIDDEN / ms / 1e9, "error": error,
            }  # fmt: skip


if __name__ == "__main__":
    products_8bit.main(__doc__, records)
