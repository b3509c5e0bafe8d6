"""Matrix products with an epilogue, through the plans of cuBLASLt."""

from collections.abc import Callable

import torch

from . import _plans
from ._library import cuda_extension

RULES = 2  # the edition of those by which csrc/linear.cpp takes candidates: files of others name other places
CUBLASLT = _plans.Library("cuBLASLt", "products", lambda: f"{cuda_extension().cublaslt_version()}-{RULES}", untimed=0)
WORTH_A_SEARCH = 2e9  # multiplications: some microseconds


def available() -> bool:
    """Whether the CUDA extension was built with cuBLASLt."""
    return hasattr(cuda_extension(), "Product")


def accepts(left: torch.Tensor, right: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """What `product` is for: half precision on a GPU, not empty, rows and addresses of whole 16 bytes.

    right, which is to be rounded, and others, vectors and matrices of the result's width, may also be float32.
    """
    if not left.is_cuda or left.dtype not in (torch.float16, torch.bfloat16):
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
    """epilogue(left · right + residual), and what else the epilogue gives; see csrc/linear.h.

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
    arguments = (left_transposed, right_transposed, dtype == torch.float32, epilogue)
    plan = _plans.find(
        CUBLASLT,
        (left.dtype, rows, columns, depth, *arguments, residual is not None),
        left.device,
        rows * columns * depth >= WORTH_A_SEARCH,
        lambda: cuda_extension().Product(as_rows(left), right, *arguments),
        lambda plan: plan(left, right, **operands),
        fallback,
    )
    return fallback() if plan is None else tuple(plan(left, right, **operands))
