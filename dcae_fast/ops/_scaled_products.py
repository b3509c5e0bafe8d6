"""Matrix products of float8 with scales, computed by cuBLASLt; see _products.py."""

from collections.abc import Callable

import torch

from . import _plans
from ._library import cuda_extension
from ._products import RULES, WORTH_A_SEARCH, epilogue

CUBLASLT = _plans.Library(
    "cuBLASLt",
    "float8-products",
    lambda: f"{cuda_extension().cublaslt_version()}-{RULES}",
    takes_first_untimed=True,
    fallback_call=0.005,
)


def available() -> bool:
    """Whether the CUDA extension was built with a cuBLASLt that scales rows: 12.9 or newer."""
    return hasattr(cuda_extension(), "ScaledProduct")


def _shape_of(x, weight, bias, residual, dtype, fast, act) -> tuple:
    """Everything that a plan depends on."""
    rows, (columns, depth) = x.numel() // x.shape[-1], weight.shape
    return x.dtype, weight.dtype, rows, columns, depth, dtype, epilogue(act, bias), residual is not None, fast


def key_of(x, weight, bias, residual, dtype, fast, act="") -> tuple:
    return _plans.key_of(CUBLASLT, _shape_of(x, weight, bias, residual, dtype, fast, act), x.device)


def product(
    fallback: Callable[[], torch.Tensor],
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    fast: bool,
    act: str = "",
    out_factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_rows`, or `bounded_linear_gelu`, for contiguous tensors; the bias has the type that cuBLASLt takes, see
    csrc/plans/product.h.

    fallback: the same in PyTorch, used where it is faster or cuBLASLt is not available. act: "gelu", or "" for none.
    out_factor: [1], of a result in float8, for which both scales are [1] too.
    """
    if not available():
        return fallback()
    shape = _shape_of(x, weight, bias, residual, dtype, fast, act)
    rows, columns, depth = shape[2:5]
    operands = x, x_scale, weight, weight_scale, bias, residual, out_factor
    plan = _plans.find(
        CUBLASLT,
        shape,
        x.device,
        rows * columns * depth >= WORTH_A_SEARCH,
        lambda: cuda_extension().ScaledProduct(x, weight, dtype, epilogue(act, bias), fast, out_factor is None),
        lambda plan: plan(*operands),
        fallback,
    )
    return fallback() if plan is None else plan(*operands)
