"""Matrix products with an epilogue, through the plans of cuBLASLt."""

from collections.abc import Callable

import torch

from . import _plans
from ._library import HALVES, cuda_extension

RULES = 3  # the edition of those by which candidates are taken and chosen: files of others name other ones
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
    """What `product` is for: half precision on a GPU, not empty, rows and addresses of whole 16 bytes.

    right, which is to be rounded, and others, vectors and matrices of the result's width, may also be float32.
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


def found_layer(
    dtype: torch.dtype, rows: int, weight: torch.Tensor, epilogue: str, residual: torch.dtype | None = None
) -> object | None:
    """The plan that `product` has for x · weightᵀ, with so many rows in x, of this type, and a residual of that type.

    None if it was not called so yet, or if the fallback is faster.
    """
    columns, depth = weight.shape
    key = _key(dtype, rows, columns, depth, False, True, residual or dtype, epilogue, residual is not None)
    return _plans.found(CUBLASLT, key, weight.device)


def found_gradients(
    dtype: torch.dtype, rows: int, weight: torch.Tensor, sums: bool
) -> tuple[object | None, object | None]:
    """Those for its gradients, dy · weight and dyᵀ · x, the latter with the sums of dy or without."""
    columns, depth = weight.shape
    keys = (
        _key(dtype, rows, depth, columns, False, False, dtype, "none", False),
        _key(dtype, columns, depth, rows, True, False, weight.dtype, "bgrad" if sums else "none", False),
    )
    return tuple(_plans.found(CUBLASLT, key, weight.device) for key in keys)


def _key(dtype, rows, columns, depth, left_transposed, right_transposed, out_dtype, epilogue, has_residual):
    """What plans depend on."""
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
    """epilogue(left · right + residual), and what else the epilogue gives; see csrc/plans/product.h.

    left: [..., depth], right: [depth, columns], contiguous; those that are said to be are transposed in memory, and
    then left is a matrix. dtype: of the result [..., columns], by default that of the residual, without one that of
    left; the bias is brought to it. fallback: the same in PyTorch, for where it is faster or cuBLASLt not at hand.
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
