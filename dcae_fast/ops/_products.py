"""Matrix products with an epilogue, computed by cuBLASLt."""

from collections.abc import Callable

import torch

from . import _plans
from ._library import HALVES, cuda_extension

RULES = 3  # version of the rules that list and choose candidates: part of the cache file's name
CUBLASLT = _plans.Library(
    "cuBLASLt",
    "products",
    lambda: f"{cuda_extension().cublaslt_version()}-{RULES}",
    takes_first_untimed=True,
    fallback_call=0.005,
)
WORTH_A_SEARCH = 2e9  # multiplications: some microseconds


def available() -> bool:
    """Whether the CUDA extension was built with cuBLASLt."""
    return hasattr(cuda_extension(), "Product")


def accepts(left: torch.Tensor, right: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether `product` takes these: half precision on a GPU, not empty, rows and addresses multiples of 16 bytes.

    right, which the caller rounds, and others, vectors and matrices of the result's width, may also be float32.
    """
    if not left.is_cuda or left.dtype not in HALVES:
        return False
    for tensor in (left, right, *others):  # a loop, since this is asked before each product
        if tensor is None:
            continue
        if tensor.dtype not in (left.dtype, torch.float32) or tensor.numel() == 0:
            return False
        if tensor.shape[-1] % 8 or tensor.data_ptr() % 16:
            return False
    return True


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., K] → [rows, K]."""
    return x.reshape(-1, x.shape[-1])


def epilogue(act: str, bias: torch.Tensor | None) -> str:
    """The name of the epilogue that adds the bias, if there is one, and applies the activation, "" for none."""
    if bias is None:
        return act or "none"
    return f"{act}_bias" if act else "bias"


def key_of_layer(
    dtype: torch.dtype, rows: int, weight: torch.Tensor, epilogue: str, residual: torch.dtype | None = None
) -> tuple:
    """The key of the plan with which `product` computes x · weightᵀ, for x of this type and number of rows.

    residual: its type, None without one.
    """
    columns, depth = weight.shape
    shape = _key(dtype, rows, columns, depth, False, True, residual or dtype, epilogue, residual is not None)
    return _plans.key_of(CUBLASLT, shape, weight.device)


def found_gradients(
    dtype: torch.dtype, rows: int, weight: torch.Tensor, sums: bool
) -> tuple[object | None, object | None]:
    """The plans for the gradients, dy · weight and dyᵀ · x. sums: whether dyᵀ · x also sums dy over its rows."""
    columns, depth = weight.shape
    keys = (
        _key(dtype, rows, depth, columns, False, False, dtype, "none", False),
        _key(dtype, columns, depth, rows, True, False, weight.dtype, "bgrad" if sums else "none", False),
    )
    return tuple(_plans.found(_plans.key_of(CUBLASLT, key, weight.device)) for key in keys)


def _key(dtype, rows, columns, depth, left_transposed, right_transposed, out_dtype, epilogue, has_residual):
    """Everything that a plan depends on."""
    transposed = left_transposed, right_transposed
    return dtype, rows, columns, depth, *transposed, out_dtype == torch.float32, epilogue, has_residual


def product(
    fallback: Callable[[], tuple[torch.Tensor, ...]],
    left: torch.Tensor,
    right: torch.Tensor,
    epilogue: str = "none",
    left_transposed: bool = False,
    right_transposed: bool = False,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """epilogue(left · right + residual), and further results of the epilogue; see csrc/plans/product.h.

    left: [..., depth]; right: [depth, columns]; both contiguous. left_transposed, right_transposed: whether the matrix
    lies transposed in memory; a transposed left has two dimensions. dtype: of the result [..., columns], by default the
    type of the residual, or without one the type of left; the bias is converted to it. fallback: the same in PyTorch,
    used where it is faster or cuBLASLt is not available.
    """
    if not available():
        return fallback()
    dtype = dtype or (left if residual is None else residual).dtype
    operands = {"bias": None if bias is None else bias.to(dtype), "residual": residual}
    depth, columns = right.shape[::-1] if right_transposed else right.shape
    rows = left.numel() // depth
    key = _key(
        left.dtype, rows, columns, depth, left_transposed, right_transposed, dtype, epilogue, residual is not None
    )
    plan = _plans.find(
        CUBLASLT,
        key,
        left.device,
        rows * columns * depth >= WORTH_A_SEARCH,
        lambda: cuda_extension().Product(as_rows(left), right, *key[4:8]),
        lambda plan: plan(left, right, **operands),
        fallback,
    )
    return fallback() if plan is None else tuple(plan(left, right, **operands))
