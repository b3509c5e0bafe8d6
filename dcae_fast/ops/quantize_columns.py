"""8-bit copies of a matrix and of 8-bit rows, transposed, for products that sum along the other dimension.

    quantize_columns:  qᵀ, scale = quantize_rows(xᵀ)
    transpose_rows:    scale' = max over the rows of scale,   qᵀ = (q · scale / scale')ᵀ

A product sums along the rows of both operands, and a scale belongs to such a row. The gradient of a layer's input,
dy · weight, therefore reads the weight quantised along the other dimension: `quantize_columns`. The gradient of the
weight, dyᵀ · x, reads activations along the tokens: `transpose_rows` makes them from the rows that the other products
read, at one byte for each element read and written. All scales are powers of two. So transposing rounds only numbers
that the common scale takes below the smallest normal number of the type.

x: [R, C] → [C, R] with scale [C, 1] in fp32. q: [..., C] with scale [..., 1] → [C, R'] with scale [C, 1], where R' is
the number of rows, rounded up to a multiple of 16 by zeros, as products on a GPU need it. One scale that is NaN makes
everything NaN.
"""

import torch.nn.functional as F

from ._library import KERNEL_DTYPES, define
from ._products import as_rows
from .quantize_rows import LARGEST_EXPONENTS, quantize_rows_reference

MULTIPLE = 16  # of R'


def quantize_columns_reference(x, dtype):
    return quantize_rows_reference(x.T.contiguous(), "none", dtype)


def transpose_rows_reference(q, scale):
    rows, scales = as_rows(q).float(), scale.reshape(-1, 1)
    common = scales.amax(0, keepdim=True) if scales.numel() else scales.new_ones(1, 1)
    transposed = F.pad((rows * (scales / common)).T, (0, -rows.shape[0] % MULTIPLE))
    return transposed.contiguous().to(q.dtype), common.expand(q.shape[-1], 1).contiguous()


quantize_columns_op = define(
    "quantize_columns(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    quantize_columns_reference,
    lambda x, dtype: x.dtype in KERNEL_DTYPES and dtype in LARGEST_EXPONENTS and x.numel() > 0,
    "quantize_columns",
)
transpose_rows_op = define(
    "transpose_rows(Tensor q, Tensor scale) -> (Tensor, Tensor)",
    transpose_rows_reference,
    lambda q, scale: q.dtype in LARGEST_EXPONENTS and q.numel() > 0,
    "quantize_columns",
)
