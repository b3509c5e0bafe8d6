"""Linear layer of rows in 8 bit, each with its own scale; see quantize_rows.py.

    y = (x · weightᵀ) · x_scale · weight_scaleᵀ + bias + residual

x: [..., K] and x_scale: [..., 1]; weight: [M, K] and weight_scale: [M, 1]; bias: [M]; residual, y: [..., M]. x and
weight are both int8, or both float8 of which at most one is float8_e5m2. The residual has the type of y.

Sums of int8 are exact integers, sums of float8 are in fp32. Scales, bias and residual are applied in fp32. On Hopper,
with K and M multiples of 16:

float8: cuBLASLt computes, with scales, bias and residual within the product. Hopper's matrix units add products of
    float8 with about 14 bits, relative to the largest of them; unless `fast`, such sums are added in fp32 every few
    products. Without the CUDA extension PyTorch computes the product, rounds it to half precision, and adds the
    residual afterwards.
int8: a Triton kernel computes, whose tiles are timed once for each shape.

In all other cases PyTorch computes in fp32, int8 in fp64, which is exact and slow. There is no gradient.
"""

import torch

from . import _int8_products, _plans, _scaled_products
from ._library import HALVES, KERNEL_DTYPES, define, is_hopper, without_autocast
from ._private import scaled_product
from ._products import as_rows
from .quantize import check_no_gradient
from .quantize_rows import ROW_DTYPES

MULTIPLE = 16  # of K and M


@without_autocast
def linear_rows_reference(x, x_scale, weight, weight_scale, bias, residual, dtype, fast):
    wide = torch.float64 if x.dtype == torch.int8 else torch.float32
    y = (x.to(wide) @ weight.to(wide).T).float() * x_scale * weight_scale[:, 0]
    y = y if bias is None else y + bias.float()
    return (y if residual is None else y + residual.float()).to(dtype)


def _accepts(x, x_scale, weight, weight_scale, bias, residual, dtype, fast):
    return (
        (_int8_products.accepts(x, weight) if x.dtype == torch.int8 else is_hopper(x.device))
        and x.numel() > 0
        and weight.shape[0] > 0
        and weight.shape[0] % MULTIPLE == weight.shape[1] % MULTIPLE == 0
        and (bias is None or bias.dtype in KERNEL_DTYPES)
        and all(t is None or t.data_ptr() % 16 == 0 for t in (x, x_scale, weight, weight_scale, residual))
    )


def _launch(x, x_scale, weight, weight_scale, bias, residual, dtype, fast):
    if x.dtype == torch.int8:
        return _int8_products.product(x, x_scale, weight, weight_scale, bias, residual, dtype)
    half = dtype if dtype in HALVES else torch.bfloat16
    bias = None if bias is None else bias.to(half)

    def fallback():
        y = scaled_product(
            as_rows(x), weight.T, as_rows(x_scale), weight_scale.T, bias=bias, out_dtype=half, use_fast_accum=fast
        )
        y = y.view(*x.shape[:-1], -1)
        return y.to(dtype) if residual is None else y + residual

    return _scaled_products.product(fallback, x, x_scale, weight, weight_scale, bias, residual, dtype, fast)


def _prepare(x, x_scale, weight, weight_scale, bias, residual, dtype, fast):
    """Runs the plan that is known by then for this shape, without looking at the arguments again."""
    if x.dtype == torch.int8:
        return _int8_products.prepared(x, weight, bias, residual, dtype)
    half = dtype if dtype in HALVES else torch.bfloat16
    if not _scaled_products.available() or (bias is not None and bias.dtype != half):
        return None
    key = _scaled_products.key_of(x, weight, bias, residual, dtype, fast)

    def run(*args):
        plan = _plans.found(key)
        return _launch(*args) if plan is None else plan(*args[:6])

    return run


linear_rows_op = define(
    "linear_rows(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? residual,"
    " ScalarType dtype, bool fast) -> Tensor",
    linear_rows_reference,
    _accepts,
    _launch,
    prepare=_prepare,
)


def linear_rows(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    fast: bool = True,
) -> torch.Tensor:
    """y; see the head of this file.

    x: [..., K], x_scale: [..., 1]; weight: [M, K], weight_scale: [M, 1]: results of `quantize_rows`. bias: [M];
    residual: [..., M] of type `dtype`, the type of y. Returns [..., M], contiguous. Raises ValueError on other shapes
    and types; RuntimeError if a tensor requires a gradient.
    """
    _check_operands(x, x_scale, weight, weight_scale)
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype={dtype}; expected one of {', '.join(map(str, KERNEL_DTYPES))}")
    shape = (*x.shape[:-1], weight.shape[0])
    if bias is not None and bias.shape != shape[-1:]:
        raise ValueError(f"bias is {list(bias.shape)}; expected [{shape[-1]}], one for each output")
    if residual is not None and (residual.shape != shape or residual.dtype != dtype):
        raise ValueError(f"residual is {residual.dtype} {list(residual.shape)}; expected {dtype} {list(shape)}")
    check_no_gradient(x_scale, weight_scale, bias, residual)
    if x.dim() <= 3:
        return linear_rows_op(x, x_scale, weight, weight_scale, bias, residual, dtype, fast)
    residual = None if residual is None else as_rows(residual)  # an operator takes four dimensions for an image
    rows = as_rows(x), x_scale.reshape(-1, 1)
    return linear_rows_op(*rows, weight, weight_scale, bias, residual, dtype, fast).view(shape)


def _check_operands(x, x_scale, weight, weight_scale):
    """Raises ValueError unless these are rows in 8 bit of types that can be multiplied, and their scales."""
    types = {x.dtype, weight.dtype}
    if not types.issubset(ROW_DTYPES) or (torch.int8 in types and len(types) > 1):
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}; expected int8 twice, or float8 twice")
    if types == {torch.float8_e5m2}:
        raise ValueError("x and weight are float8_e5m2; expected float8_e4m3fn for at least one of them")
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x is {list(x.shape)}, weight {list(weight.shape)}: expected [..., K] and [M, K]")
    for name, scale, rows in (("x_scale", x_scale, x), ("weight_scale", weight_scale, weight)):
        expected = (*rows.shape[:-1], 1)
        if scale.shape != expected or scale.dtype != torch.float32:
            raise ValueError(f"{name} is {scale.dtype} {list(scale.shape)}; expected float32 {list(expected)}")
