"""The first layer of an MLP in float8, with scales that follow from the weights rather than from each token.

    y = norm(x) · norm_weight + norm_bias;                       bounded_layer_norm:   q = y · (1 / y_scale)
    h = (q · weightᵀ) · y_scale · weight_scale + bias;           bounded_linear_gelu:  g = gelu(h) · (1 / g_scale)

x, y: [B, N, D]; h: [B, N, H]; q, g: float8_e4m3fn; scales: [1] fp32, powers of two, from `mlp_bounds`. A norm of D
numbers has the length √D at most, so

    |y_i| ≤ √D |norm_weight_i| + |norm_bias_i|,    |h_j| ≤ √D ‖weight_j · norm_weight‖ + |weight_j · norm_bias + bias_j|

and nothing exceeds the largest number of float8, whatever x is. So cuBLASLt applies GELU and rounds within the product:
it cannot scale each token by its largest number, which is known only after the product. A bound is some powers of two
larger than the numbers. e4m3 spans 15 powers of two with full precision, and a few of them are enough.

GELU is computed in its tanh form. x that is not finite gives NaN. No operator has a gradient.
"""

import torch
import torch.nn.functional as F

from . import _library, _plans, _scaled_products
from ._library import KERNEL_DTYPES, capability, define, is_hopper, without_autocast
from ._private import scaled_product
from ._products import as_rows
from .layer_norm import check_norm, layer_norm_reference
from .linear_rows import MULTIPLE
from .quantize import check_no_gradient
from .quantize_rows import MOST_COLUMNS, scale_of

FORMAT, LARGEST = torch.float8_e4m3fn, 448.0
ROUNDING = 2**-4  # the largest relative error of a number in e4m3


def _rounded(y, factor):
    return (y * factor).clamp(-LARGEST, LARGEST).to(FORMAT)


def bounded_layer_norm_reference(x, weight, bias, eps, factor):
    return _rounded(layer_norm_reference(x, weight, bias, eps, None, None, torch.float32)[1], factor)


@without_autocast
def bounded_linear_gelu_reference(x, x_scale, weight, weight_scale, bias, factor):
    h = (x.float() @ weight.float().T) * (x_scale * weight_scale)
    return _rounded(F.gelu(h if bias is None else h + bias.float(), approximate="tanh"), factor)


def _accepts_norm(x, weight, bias, eps, factor):
    return (
        x.numel() > 0
        and x.shape[-1] <= MOST_COLUMNS
        and all(tensor.dtype in KERNEL_DTYPES for tensor in (x, weight, bias))
        and (_library.INTERPRETED or capability(x.device) >= (8, 9))
    )


def _accepts_linear(x, x_scale, weight, weight_scale, bias, factor):
    return (
        is_hopper(x.device)
        and x.numel() > 0
        and weight.shape[0] > 0
        and weight.shape[0] % MULTIPLE == weight.shape[1] % MULTIPLE == 0
        and all(t.data_ptr() % 16 == 0 for t in (x, x_scale, weight, weight_scale, factor))
    )


def _launch(x, x_scale, weight, weight_scale, bias, factor):
    bias = None if bias is None else bias.to(torch.bfloat16)

    def fallback():
        h = scaled_product(
            as_rows(x), weight.T, x_scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return _rounded(F.gelu(h.float(), approximate="tanh"), factor).view(*x.shape[:-1], -1)

    return _scaled_products.product(
        fallback, x, x_scale, weight, weight_scale, bias, None, FORMAT, fast=True, act="gelu", out_factor=factor
    )


def _prepare(x, x_scale, weight, weight_scale, bias, factor):
    """Runs the plan that is known by then for this shape, without looking at the arguments again."""
    if not _scaled_products.available() or (bias is not None and bias.dtype != torch.bfloat16):
        return None
    key = _scaled_products.key_of(x, weight, bias, None, FORMAT, fast=True, act="gelu")

    def run(*args):
        plan = _plans.found(key)
        return _launch(*args) if plan is None else plan(*args[:5], None, args[5])

    return run


bounded_layer_norm_op = define(
    "bounded_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor factor) -> Tensor",
    bounded_layer_norm_reference,
    _accepts_norm,
    "layer_norm_rows",
)
bounded_linear_gelu_op = define(
    "bounded_linear_gelu(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor factor)"
    " -> Tensor",
    bounded_linear_gelu_reference,
    _accepts_linear,
    _launch,
    prepare=_prepare,
)


def multiplies_within_bounds() -> bool:
    """Whether `bounded_linear_gelu` is one product. Without the CUDA extension, scales by row are as fast."""
    return _library.INTERPRETED or _scaled_products.available()


@torch.no_grad()
@without_autocast
def mlp_bounds(
    norm_weight: torch.Tensor, norm_bias: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y_scale, q_weight, weight_scale, g_scale), see the head of this file.

    norm_weight, norm_bias: [D]; weight: [H, D]; bias: [H]. The weight has one scale. The bound of h includes that both
    factors of each product are rounded.
    """
    weight, gain, shift = weight.float(), norm_weight.float(), norm_bias.float()
    root = weight.shape[1] ** 0.5
    reach, centre = root * (weight * gain).norm(dim=1), weight @ shift
    centre = centre if bias is None else centre + bias.float()
    rounding = (1 + ROUNDING) ** 2 - 1
    most = centre.abs() + reach + rounding * (reach + weight.abs() @ shift.abs())
    y_scale, weight_scale, g_scale = (
        scale_of(largest.amax().view(1), FORMAT) for largest in (root * gain.abs() + shift.abs(), weight.abs(), most)
    )
    return y_scale, _rounded(weight, 1 / weight_scale), weight_scale, g_scale


def bounded_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, factor: torch.Tensor
) -> torch.Tensor:
    """q, see the head of this file. x: [B, N, D]; weight, bias: [D]; factor: 1 / y_scale, [1]."""
    check_norm(x, weight, bias, None, None)
    check_no_gradient(x, weight, bias)
    return bounded_layer_norm_op(x, weight, bias, eps, factor)


def bounded_linear_gelu(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor,
) -> torch.Tensor:
    """g, see the head of this file. x: [B, N, D]; weight: [H, D], both e4m3; bias: [H]; scales and factor, 1 / g_scale:
    [1].

    Raises ValueError on other shapes and types.
    """
    if x.dim() != 3 or weight.dim() != 2 or x.shape[2] != weight.shape[1] or {x.dtype, weight.dtype} != {FORMAT}:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}, weight {weight.dtype} {list(weight.shape)}: expected [B, N, D] and [H, D]"
            f" of {FORMAT}"
        )
    if any(scale.shape != (1,) or scale.dtype != torch.float32 for scale in (x_scale, weight_scale, factor)):
        raise ValueError("x_scale, weight_scale, factor: expected float32 [1] each")
    check_no_gradient(bias)
    return bounded_linear_gelu_op(x, x_scale, weight, weight_scale, bias, factor)
