"""Convolutions of int8 images with an epilogue, for inference.

    y = act(scale · conv(x, weight) + bias) + residual
    q = quantize(y, out_factor)

x: [B, C, H, W] int8 channels-last; weight: [K, C, R, R] int8 with R 1 or 3, stride 1 and padding R // 2; scale: [K]
fp32; bias: [K]; residual, y and q: [B, K, H, W]; out_factor: [K] fp32, see quantize.py. Sums of products are exact
integers. The epilogue computes in fp32; nothing is rounded between the sums and the results. Either result or both are
written: the residual stream and the operand of the next convolution.

`upsample_conv2d_int8` is the same for `upsample_conv2d`: weight is [4 K, C, 2, 2], a quantised result of
`subpixel_weights`, scale [4 K]; residual, y and q are planes [4 B, K, H, W].

The kernel needs Hopper, channels and filters in multiples of 16. Elsewhere PyTorch computes the sums in float64, which
is exact and slow.
"""

import torch
import torch.nn.functional as F

from . import _library, _plans
from ._elementwise import ACTIVATIONS, activate, check_activation, check_filters
from ._library import KERNEL_DTYPES, define, is_hopper, launcher
from ._tiles import TileCandidates
from .quantize import check_factor, check_no_gradient, quantize_reference
from .upsample_conv2d import upsample_conv2d_reference

WINDOWS = (1, 1), (3, 3)
WORTH_A_SEARCH = 5e7  # multiplications
MOST_PRODUCTS = 2**17  # in a sum: 128² times as much still fits in int32
MOST_POSITIONS = 2**31 - 2**10  # coordinates have 32 bits, and boxes may leave the image
TRITON = _plans.Library("Triton", "int8-convolutions", lambda: launcher("conv2d_int8", "tiles_version")())
PLAIN = None, "none", None, torch.bfloat16, None  # the epilogue with which tiles are timed: bias, act, ..., out_factor


def epilogue(total, scale, bias, act, residual, dtype, out_factor):
    """total: the sums, [B, K, H, W] float64; scale: [K, 1, 1], or one for each image, [B, K, 1, 1]."""
    y = total.float() * scale
    y = activate(y if bias is None else y + bias.float().view(-1, 1, 1), act)
    y = y if residual is None else y + residual.float()
    results = [] if dtype is None else [y.to(dtype)]
    return results if out_factor is None else [*results, quantize_reference(y, out_factor)]


def conv2d_int8_reference(x, weight, scale, *rest):
    total = F.conv2d(x.double(), weight.double(), padding=weight.shape[2] // 2)
    return epilogue(total, scale.view(-1, 1, 1), *rest)


def upsample_conv2d_int8_reference(x, weight, scale, *rest):
    total = upsample_conv2d_reference(x.double(), weight.double())
    scales = scale.view(4, 1, -1).expand(-1, x.shape[0], -1).reshape(*total.shape[:2], 1, 1)
    return epilogue(total, scales, *rest)


def _accepts(x, weight, scale, bias, act, residual, dtype, out_factor):
    filters = weight.shape[0] // (4 if weight.shape[2] == 2 else 1)
    return (
        (_library.INTERPRETED or is_hopper(x.device))
        and x.numel() > 0
        and filters > 0
        and x.shape[1] % 16 == filters % 16 == 0
        and weight[0].numel() <= MOST_PRODUCTS
        and x.numel() // x.shape[1] < MOST_POSITIONS
        and all(t is None or t.data_ptr() % 16 == 0 for t in (x, weight, residual))
        and all(t is None or t.dtype in KERNEL_DTYPES for t in (bias, residual))
        and (dtype is None or dtype in KERNEL_DTYPES)
    )


def few_rows(x: torch.Tensor) -> torch.Tensor:
    """The first rows of images, for which Triton compiles the same kernel as for x: it distinguishes 1 and multiples
    of 16.
    """
    return x[:, :, : 16 + x.shape[2] % 16].contiguous(memory_format=torch.channels_last)


def _tile_of(x, weight, scale):
    """The fastest tile for these shapes, whatever the epilogue."""
    launch = launcher("conv2d_int8", "launch_conv2d_int8")
    tiles = launcher("conv2d_int8", "tiles_of")(weight)
    if not x.is_cuda:
        return tiles[0]
    plan = _plans.find(
        TRITON,
        (tuple(x.shape), tuple(weight.shape)),
        x.device,
        x.numel() // x.shape[1] * weight.numel() >= WORTH_A_SEARCH,
        lambda: TileCandidates(tiles, lambda tile: launch(few_rows(x), weight, scale, *PLAIN, tile), x.device),
        lambda plan: launch(x, weight, scale, *PLAIN, plan.tile),
        lambda: launch(x, weight, scale, *PLAIN, tiles[0]),
    )
    return tiles[0] if plan is None else plan.tile


def _launch(x, weight, scale, *epilogue):
    return launcher("conv2d_int8", "launch_conv2d_int8")(x, weight, scale, *epilogue, _tile_of(x, weight, scale))


_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str act, Tensor? residual, ScalarType? dtype,"
    " Tensor? out_factor) -> Tensor[]"
)
conv2d_int8_op = define("conv2d_int8" + _SCHEMA, conv2d_int8_reference, _accepts, _launch)
upsample_conv2d_int8_op = define("upsample_conv2d_int8" + _SCHEMA, upsample_conv2d_int8_reference, _accepts, _launch)


def _call(op, x, weight, scale, bias, act, residual, dtype, out_factor, shape):
    """The operator's results, None in place of a result that is not wanted. shape: of a result."""
    if act not in ACTIVATIONS:
        check_activation(act)
    if x.dtype != torch.int8 or weight.dtype != torch.int8 or scale.dtype != torch.float32:
        raise ValueError(
            f"expected int8, int8 and float32; got x {x.dtype}, weight {weight.dtype}, scale {scale.dtype}"
        )
    check_filters(weight, scale=scale)
    for name, tensor, expected in (("bias", bias, shape[1:2]), ("residual", residual, shape)):
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(expected)}")
    if dtype is None and out_factor is None:
        raise ValueError("neither dtype nor out_factor is given; expected at least one result")
    if out_factor is not None:
        check_factor("out_factor", out_factor, shape[1])
    check_no_gradient(scale, bias, residual, out_factor)
    results = op(x, weight, scale, bias, act, residual, dtype, out_factor)
    return results[0] if dtype is not None else None, results[-1] if out_factor is not None else None


def conv2d_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "none",
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    out_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) of a 3×3 or 1×1 convolution; see the head of this file.

    act: "none", "relu" or "silu". dtype: of y; None if y is not wanted. out_factor: of q; None if q is not wanted.
    Results are channels-last. Raises ValueError on other shapes, types and activations, and without a result;
    RuntimeError if a tensor requires a gradient.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1] != x.shape[1] or weight.shape[2:] not in WINDOWS:
        raise ValueError(
            f"x is {list(x.shape)}, weight {list(weight.shape)}: expected [B, C, H, W] and [K, C, 1, 1] or [K, C, 3, 3]"
        )
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return _call(conv2d_int8_op, x, weight, scale, bias, act, residual, dtype, out_factor, shape)


def upsample_conv2d_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "none",
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    out_factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) of a 3×3 convolution of the image up-sampled 2×, as planes; see the head of this file.

    The arguments and errors are those of `conv2d_int8`, but for the shapes of weight, scale and residual.
    """
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 2, 2) or weight.shape[0] % 4:
        raise ValueError(f"x is {list(x.shape)}, weight {list(weight.shape)}: expected [B, C, H, W] and [4 K, C, 2, 2]")
    shape = 4 * x.shape[0], weight.shape[0] // 4, *x.shape[2:]
    return _call(upsample_conv2d_int8_op, x, weight, scale, bias, act, residual, dtype, out_factor, shape)
