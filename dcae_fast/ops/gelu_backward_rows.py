"""The gradient of GELU, rounded to 8-bit rows: the middle of the backward pass of an MLP that trains in 8 bit.

    dh = dg · gelu'(h),    g = gelu(h)

dg, h: [..., H]; dtype: of the rows of dh. Without everything: dh and g in h's type, for products in half precision, and
the 8-bit rows of dh. With everything: only the 8-bit rows of dh and g. Results that are not wanted are empty. Always
the sum of dh over all rows, [H] in fp32. Everything is computed in fp32 and rounded once; rows are rounded as in
quantize_rows.py. "gelu" and "gelu_tanh" are the same tanh form, as where g is rounded in the forward pass.
"""

import torch
import torch.nn.functional as F

from ._library import KERNEL_DTYPES, define
from ._products import as_rows
from .quantize_rows import LARGEST_EXPONENTS, MOST_COLUMNS, quantize_rows_reference

FORMAT = torch.float8_e4m3fn  # of the rows of g


def gelu_backward_rows_reference(dg, h, act, dtype, everything, wants_g):
    wide, empty = h.float(), h.new_empty(0)
    dh = torch.ops.aten.gelu_backward(dg.float(), wide, approximate="tanh")
    g = F.gelu(wide, approximate="tanh")
    rows = quantize_rows_reference(dh, "none", dtype)
    total = as_rows(dh).sum(0)
    no_rows = empty.to(FORMAT), empty.float()
    if everything:
        return empty, *rows, empty, *(quantize_rows_reference(g, "none", FORMAT) if wants_g else no_rows), total
    return dh.to(h.dtype), *rows, g.to(h.dtype) if wants_g else empty, *no_rows, total


gelu_backward_rows_op = define(
    "gelu_backward_rows(Tensor dg, Tensor h, str act, ScalarType dtype, bool everything, bool wants_g)"
    " -> (Tensor dh, Tensor dh_q, Tensor dh_scale, Tensor g, Tensor g_q, Tensor g_scale, Tensor total)",
    gelu_backward_rows_reference,
    lambda dg, h, act, dtype, everything, wants_g: (
        dg.dtype == h.dtype
        and h.dtype in KERNEL_DTYPES
        and dtype in LARGEST_EXPONENTS
        and 0 < h.shape[-1] <= MOST_COLUMNS
        and h.numel() > 0
    ),
    "gelu_backward_rows",
)
