"""A gradient of tokens, rounded for the products of a layer that trains in 8 bit.

dy: [..., C], often in fp32, as residual streams are. Returns dy in half precision, for a product in half precision;
the 8-bit rows of dy, see quantize_rows.py; and the sum of dy over all rows, [C] in fp32, the gradient of a bias. All of
these are rounded from dy itself, in one pass. Results that are not wanted are empty.
"""

from ._library import KERNEL_DTYPES, define
from ._products import as_rows
from .quantize_rows import LARGEST_EXPONENTS, MOST_COLUMNS, quantize_rows_reference


def gradient_rows_reference(dy, dtype, rows_dtype, wants_half, wants_sum):
    empty, rows = dy.new_empty(0), quantize_rows_reference(dy, "none", rows_dtype)
    total = as_rows(dy).float().sum(0) if wants_sum else empty.float()
    return dy.to(dtype, copy=True) if wants_half else empty.to(dtype), *rows, total


gradient_rows_op = define(
    "gradient_rows(Tensor dy, ScalarType dtype, ScalarType rows_dtype, bool wants_half, bool wants_sum)"
    " -> (Tensor half, Tensor q, Tensor scale, Tensor total)",
    gradient_rows_reference,
    lambda dy, dtype, rows_dtype, wants_half, wants_sum: (
        dy.dtype in KERNEL_DTYPES
        and dtype in KERNEL_DTYPES
        and rows_dtype in LARGEST_EXPONENTS
        and 0 < dy.shape[-1] <= MOST_COLUMNS
        and dy.numel() > 0
    ),
    "gradient_rows",
)
