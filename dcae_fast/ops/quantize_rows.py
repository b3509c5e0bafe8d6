"""Rounding to 8 bit with one scale for each row: of a token, or of an output channel of a weight.

    quantize_rows:     q, scale = rounded(act(x))
    concatenate_rows:  q, scale = rounded([left, right])
    layer_norm_rows:   s, q, scale = s, rounded(y), with s and y of `layer_norm`
    layer_norm_and_rows:   s, y, q, scale: for training, y in half precision too

    rounded(y): q = y / scale, rounded half to even; scale depends on m = max |y| of the row

x, y, q: [..., C]; scale: [..., 1] fp32. Everything before the rounding is computed in fp32.

float8_e4m3fn, float8_e5m2: scale = 2^ceil(log2(m / largest)), where largest is the type's largest number, 448 or 57344.
    A power of two costs a floating-point type no precision, and y / scale is exact. The smallest scale is 2⁻¹²⁶, also
    of a row of zeros, so that no scale is larger than its row needs.
int8: scale = m / 127, and 1 for a row of zeros.

The scale of a row with an infinity or NaN is NaN, so that products of this row are NaN. The kernels give the same bits
as the references, but for the rounding in norms and activations. "gelu" and "gelu_tanh" are the same tanh form, whose
error is far below the rounding to 8 bit. No operator has a gradient.
"""

import torch
import torch.nn.functional as F

from . import _library
from ._library import KERNEL_DTYPES, capability, define
from .layer_norm import check_norm, layer_norm_reference
from .linear import ACTIVATIONS
from .quantize import MOST, check_no_gradient

LARGEST_EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}  # the largest number is 1.75 · 2^exponent
ROW_DTYPES = (*LARGEST_EXPONENTS, torch.int8)
MOST_COLUMNS = 16384
_LARGEST_MANTISSA = 0x600000  # of the largest numbers, 1.75, as bits of fp32


def scale_of(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale of numbers up to `largest`, in fp32, for a float8 type; NaN unless `largest` is finite."""
    bits = largest.view(torch.int32)
    exponent = (bits >> 23) - LARGEST_EXPONENTS[dtype] + ((bits & 0x7FFFFF) > _LARGEST_MANTISSA)
    return (exponent.clamp_min(1).to(torch.int32) << 23).view(torch.float32).where(largest.isfinite(), torch.nan)


def _rounded(y, dtype):
    """(q, scale) of y in fp32."""
    largest = y.abs().amax(-1, keepdim=True)
    if dtype == torch.int8:
        scale = largest * (1 / MOST)  # as the kernel; PyTorch divides in another way on a GPU than on a CPU
        scale = torch.where(scale > 0, scale, 1.0).where(largest.isfinite(), torch.nan)
        return (y * (1 / scale)).nan_to_num(0).clamp(-MOST, MOST).round().to(torch.int8), scale
    scale = scale_of(largest, dtype)
    return (y * (1 / scale)).to(dtype), scale


def quantize_rows_reference(x, act, dtype):
    x = x.float()
    return _rounded(x if act == "none" else F.gelu(x, approximate="tanh"), dtype)


def concatenate_rows_reference(left, right, dtype):
    return _rounded(torch.cat([left, right], -1).float(), dtype)


def layer_norm_rows_reference(x, scale, shift, eps, branch, gate, dtype):
    total, y = layer_norm_reference(x, scale, shift, eps, branch, gate, torch.float32)
    return total, *_rounded(y, dtype)


def layer_norm_and_rows_reference(x, scale, shift, eps, branch, gate, dtype, rows_dtype):
    total, y = layer_norm_reference(x, scale, shift, eps, branch, gate, torch.float32)
    return total, y.to(dtype), *_rounded(y, rows_dtype)


def _accepts(x, dtype, *others):
    return (
        x.numel() > 0
        and x.shape[-1] <= MOST_COLUMNS
        and all(tensor is None or tensor.dtype in KERNEL_DTYPES for tensor in (x, *others))
        and (_library.INTERPRETED or dtype == torch.int8 or capability(x.device) >= (8, 9))
    )


quantize_rows_op = define(
    "quantize_rows(Tensor x, str act, ScalarType dtype) -> (Tensor q, Tensor scale)",
    quantize_rows_reference,
    lambda x, act, dtype: _accepts(x, dtype),
    "quantize_rows",
)
concatenate_rows_op = define(
    "concatenate_rows(Tensor left, Tensor right, ScalarType dtype) -> (Tensor q, Tensor scale)",
    concatenate_rows_reference,
    lambda left, right, dtype: _accepts(left, dtype, right),
    "quantize_rows",
)
layer_norm_rows_op = define(
    "layer_norm_rows(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? branch, Tensor? gate, ScalarType dtype)"
    " -> (Tensor total, Tensor q, Tensor q_scale)",
    layer_norm_rows_reference,
    lambda x, scale, shift, eps, branch, gate, dtype: _accepts(x, dtype, scale, shift, branch, gate),
    "layer_norm_rows",
)

layer_norm_and_rows_op = define(
    "layer_norm_and_rows(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? branch, Tensor? gate,"
    " ScalarType dtype, ScalarType rows_dtype) -> (Tensor total, Tensor y, Tensor q, Tensor q_scale)",
    layer_norm_and_rows_reference,
    lambda x, scale, shift, eps, branch, gate, dtype, rows_dtype: _accepts(x, rows_dtype, scale, shift, branch, gate),
    "layer_norm_rows",
)


def check_rows(x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError unless x has rows that can be rounded to this type."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x is {list(x.shape)}; expected [..., C] with at least one column")
    if dtype not in ROW_DTYPES:
        raise ValueError(f"dtype={dtype}; expected one of {', '.join(map(str, ROW_DTYPES))}")


def quantize_rows(
    x: torch.Tensor, act: str = "none", dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of act(x); see the head of this file.

    x: [..., C]; act: "none", "gelu" or "gelu_tanh". Returns q [..., C] of `dtype` and scale [..., 1] in fp32, both
    contiguous. Raises ValueError on other activations and types, and without columns; RuntimeError if x requires a
    gradient.
    """
    if act != "none" and act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}; expected one of {('none', *ACTIVATIONS)}")
    check_rows(x, dtype)
    check_no_gradient(x)
    if x.dim() <= 3:
        return quantize_rows_op(x, act, dtype)
    rows = x.reshape(-1, x.shape[-1])  # an operator would take four dimensions for an image
    q, scale = quantize_rows_op(rows, act, dtype)
    return q.view(x.shape), scale.view(*x.shape[:-1], 1)


def concatenate_rows(
    left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) of [left, right]; see the head of this file.

    left, right: [B, N, D]. Returns q [B, N, 2 D] of `dtype` and scale [B, N, 1] in fp32. Raises ValueError on other
    shapes and types; RuntimeError if a tensor requires a gradient.
    """
    if left.dim() != 3 or left.shape != right.shape:
        raise ValueError(f"left is {list(left.shape)}, right {list(right.shape)}: expected [B, N, D] twice")
    check_rows(left, dtype)
    check_no_gradient(left, right)
    return concatenate_rows_op(left, right, dtype)


def layer_norm_rows(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    branch: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(s, q, q_scale); see the head of this file, and `layer_norm` for the arguments, shapes and errors.

    dtype: of q. Without branch and gate s is x. Raises RuntimeError if a tensor requires a gradient.
    """
    check_norm(x, scale, shift, branch, gate)
    check_rows(x, dtype)
    check_no_gradient(x, scale, shift, branch, gate)
    total, q, q_scale = layer_norm_rows_op(x, scale, shift, eps, branch, gate, dtype)
    return x if branch is None else total, q, q_scale
