"""Matrix products of int8 with one scale for each row of both operands, computed by a Triton kernel.

The tiles of the kernel are timed once for each shape; see _plans.py.
"""

from collections.abc import Callable

import torch

from . import _library, _plans
from ._library import is_hopper, launcher
from ._products import as_rows
from ._tiles import TileCandidates, processors

TRITON = _plans.Library(
    "Triton", "int8-products", lambda: launcher("linear_rows", "tiles_version")(), fallback_call=0.005
)
WORTH_A_SEARCH = 5e7  # multiplications
MOST_DEPTH = 2**17  # a sum of fewer products fits in int32
MOST_ROWS = 2**31 - 2**10  # coordinates have 32 bits, and blocks may reach beyond the last row


def accepts(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether there is a kernel on this device for x of this size."""
    depth = weight.shape[1]
    return (_library.INTERPRETED or is_hopper(x.device)) and depth < MOST_DEPTH and x.numel() < MOST_ROWS * depth


def _shape_of(x, weight, bias, residual, dtype) -> tuple:
    """Everything that the fastest tile depends on."""
    columns, depth = weight.shape
    of_bias = None if bias is None else bias.dtype
    return x.numel() // depth, columns, depth, dtype, of_bias, residual is not None


def product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`linear_rows` of int8, for contiguous tensors."""
    launch = launcher("linear_rows", "launch_linear_rows")
    args = x, x_scale, weight, weight_scale, bias, residual, dtype
    shape = rows, columns, depth, *_ = _shape_of(x, weight, bias, residual, dtype)
    tiles = launcher("linear_rows", "tiles_of")(rows, columns, depth, processors(x.device))
    if not x.is_cuda:
        return launch(*args, tiles[0])

    def compute_few(tile: tuple) -> None:
        """For the first rows, for which Triton compiles the same kernel: it distinguishes multiples of 16."""
        few = 16 + rows % 16
        x_, x_scale_, residual_ = (None if each is None else as_rows(each)[:few] for each in (x, x_scale, residual))
        launch(x_, x_scale_, weight, weight_scale, bias, residual_, dtype, tile)

    plan = _plans.find(
        TRITON,
        shape,
        x.device,
        rows * columns * depth >= WORTH_A_SEARCH,
        lambda: TileCandidates(tiles, compute_few, x.device),
        lambda plan: launch(*args, plan.tile),
        lambda: launch(*args, tiles[0]),
    )
    return launch(*args, tiles[0] if plan is None else plan.tile)


def prepared(x, weight, bias, residual, dtype) -> Callable[..., torch.Tensor]:
    """`linear_rows` for arguments like these, with the tile that is known by then."""
    key = _plans.key_of(TRITON, _shape_of(x, weight, bias, residual, dtype), x.device)
    launch = launcher("linear_rows", "launch_linear_rows")

    def run(*args):
        plan, args = _plans.found(key), args[:7]
        return product(*args) if plan is None else launch(*args, plan.tile)

    return run
