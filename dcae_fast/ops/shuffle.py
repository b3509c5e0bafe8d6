"""The space-to-channel shortcuts of DC-AE, added to the main branch, each in one pass.

    unshuffle_average_add:  out = mean over groups of pixel_unshuffle(x)        + main
    duplicate_shuffle_add:  out = pixel_shuffle(repeat_interleave(x, repeats))  + main

x: [B, C, H, W] channels-last. main has the resolution of the output or of x. With the resolution of x, main is
(un)shuffled in the same pass, which thus does both the pixel (un)shuffle and the shortcut after a convolution. For
duplicate_shuffle_add, main may also be four planes, [4 B, O, H, W]: the output's pixels of each parity, row parity
first. bias is the bias of the convolution that computed main. Without x only main is (un)shuffled.

As linear maps of x the two operators are adjoint up to a scale, so each is the gradient of the other. Summed in fp32;
the result has the promoted type of x and main. Source: residual autoencoding in DC-AE (arXiv 2410.10733).

unshuffle_average_add_int8 and duplicate_shuffle_add_int8 return the result, and the result as int8, the operand of an
8-bit convolution. Nothing is rounded before int8.
"""

import operator

import torch
import torch.nn.functional as F

from dcae_fast.models import functional

from ._library import KERNEL_DTYPES, define, differentiable
from .conv2d_gradients import sum_to_channels_op
from .quantize import check_factor, check_no_gradient, with_int8


def to_planes(y: torch.Tensor) -> torch.Tensor:
    """[B, C, 2 H, 2 W] → [4 B, C, H, W]: y[:, :, i::2, j::2] for (i, j) = (0, 0), (0, 1), (1, 0), (1, 1)."""
    batch, channels, height, width = y.shape
    y = y.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(3, 5, 0, 1, 2, 4)
    return y.reshape(4 * batch, channels, height // 2, width // 2)


def _from_planes(planes):
    return planes.unflatten(0, (2, 2, -1)).permute(2, 3, 4, 0, 5, 1).flatten(4).flatten(2, 3)


def _are_planes(x, main):
    return x is not None and main is not None and main.shape[0] == 4 * x.shape[0] and x.shape[0] > 0


def _add_main(out, main, bias, move, unmoved_size):
    if main is None:
        return out
    if bias is not None:
        main = main + bias.to(main.dtype).view(1, -1, 1, 1)
    if _are_planes(out, main):
        main = _from_planes(main)
    elif main.shape[2:] == unmoved_size:
        main = move(main)
    return main if out is None else out + main


def unshuffle_average_add_reference(x, main, bias, out_channels, factor, scale):
    source, out = main if x is None else x, None
    if x is not None:
        group = factor**2 * x.shape[1] // out_channels
        out = functional.unshuffle_average(x, out_channels, factor) * (scale * group)
    return _add_main(out, main, bias, lambda y: functional.pixel_unshuffle(y, factor), source.shape[2:])


def duplicate_shuffle_add_reference(x, main, bias, out_channels, factor, scale):
    source, out = main if x is None else x, None
    if x is not None:
        out = functional.duplicate_shuffle(x, out_channels, factor) * scale
    return _add_main(out, main, bias, lambda y: F.pixel_shuffle(y, factor), source.shape[2:])


def _empty(change_size):
    """The fake implementation. For dynamic sizes, PyTorch 2.11 cannot take views of tensors as the references do.

    change_size: the size of the result along one side, from the size of the input and the factor.
    """

    def run(x, main, bias, out_channels, factor, scale):
        source, dtype = (main, main.dtype) if x is None else (x, x.dtype)
        dtype = dtype if main is None else torch.promote_types(dtype, main.dtype)
        sides = [change_size(side, factor) for side in source.shape[2:]]
        size = (source.shape[0], out_channels, *sides)
        return torch.empty(size, dtype=dtype, device=source.device, memory_format=torch.channels_last)

    return run


def _two_empty(change_size):
    """The fake implementation of an operator that returns int8 too."""

    def run(*args):
        y = _empty(change_size)(*args[:-1])
        return y, torch.empty_like(y, dtype=torch.int8)

    return run


def _with_int8(reference):
    """The reference of an operator that returns int8 too."""

    def run(x, main, bias, out_channels, factor, scale, out_factor):
        wide = None if x is None else x.float()
        y = reference(wide, main.float(), bias, out_channels, factor, scale)
        return with_int8(y, main.dtype if x is None else torch.promote_types(x.dtype, main.dtype), out_factor)

    return run


def _accepts(x, main, bias, out_channels, factor, scale, out_factor=None):
    """The kernels take factors 1 and 2, and only powers of two as sizes of groups and numbers of repeats."""
    channels = out_channels if x is None else x.shape[1]
    ratio = max(factor**2 * channels // out_channels, factor**2 * out_channels // channels)
    fits = factor in (1, 2) and ratio & (ratio - 1) == 0
    return fits and all(tensor is None or tensor.dtype in KERNEL_DTYPES for tensor in (x, main))


# scale: factor of the sum over a group, or of the duplicates; for an average 1 / the size of a group
_ARGUMENTS = "Tensor? x, Tensor? main, Tensor? bias, int out_channels, int factor, float scale"
_SCHEMA, _INT8_SCHEMA = f"({_ARGUMENTS}) -> Tensor", f"({_ARGUMENTS}, Tensor out_factor) -> (Tensor, Tensor)"
unshuffle_average_add_op = define(
    "unshuffle_average_add" + _SCHEMA,
    unshuffle_average_add_reference,
    _accepts,
    "unshuffle_average_add",
    fake=_empty(operator.floordiv),
)
duplicate_shuffle_add_op = define(
    "duplicate_shuffle_add" + _SCHEMA,
    duplicate_shuffle_add_reference,
    _accepts,
    "duplicate_shuffle_add",
    fake=_empty(operator.mul),
)
unshuffle_average_add_int8_op = define(
    "unshuffle_average_add_int8" + _INT8_SCHEMA,
    _with_int8(unshuffle_average_add_reference),
    _accepts,
    "unshuffle_average_add",
    fake=_two_empty(operator.floordiv),
)
duplicate_shuffle_add_int8_op = define(
    "duplicate_shuffle_add_int8" + _INT8_SCHEMA,
    _with_int8(duplicate_shuffle_add_reference),
    _accepts,
    "duplicate_shuffle_add",
    fake=_two_empty(operator.mul),
)


def _setup_context(ctx, inputs, output):
    x, main, bias, _, ctx.factor, ctx.scale = inputs
    ctx.x = None if x is None else (x.shape[1], x.dtype)
    ctx.main = None if main is None else (main.shape[1], main.dtype)
    ctx.planes = _are_planes(x, main)
    ctx.moved = main is not None and main.shape[2:] != output.shape[2:]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_with(adjoint):
    def backward(ctx, dout):
        dx = dmain = dbias = None
        wants_x, wants_main, wants_bias, *_ = ctx.needs_input_grad
        if wants_x:
            channels, dtype = ctx.x
            dx = adjoint(dout, None, None, channels, ctx.factor, ctx.scale).to(dtype)
        if wants_main or wants_bias:
            channels, dtype = ctx.main
            if ctx.planes:
                dmain = to_planes(dout)
            else:
                dmain = adjoint(dout, None, None, channels, ctx.factor, 1.0) if ctx.moved else dout
            dmain = dmain.to(dtype)
        if wants_bias:
            dbias = sum_to_channels_op(dmain, ctx.bias_dtype)
        return dx, dmain, dbias, None, None, None

    return backward


differentiable(unshuffle_average_add_op, _backward_with(duplicate_shuffle_add_op), _setup_context)
differentiable(duplicate_shuffle_add_op, _backward_with(unshuffle_average_add_op), _setup_context)


def _check(x, main, bias, factor, moved_size, planes=False):
    """Whether main is not (un)shuffled yet. Raises ValueError if the shapes do not fit."""
    unmoved = x is None or main.shape[2:] == x.shape[2:]
    if main.dim() != 4 or (not unmoved and tuple(main.shape[2:]) != moved_size):
        raise ValueError(f"main is {list(main.shape)}; its size must be x's {list(x.shape[2:])} or {list(moved_size)}")
    if x is not None and x.shape[0] != main.shape[0] and not (planes and _are_planes(x, main)):
        raise ValueError(f"x is {list(x.shape)}, main {list(main.shape)}: the batches differ")
    if bias is not None and bias.shape != main.shape[1:2]:
        raise ValueError(f"bias is {list(bias.shape)}; expected [{main.shape[1]}], main's channels")
    return unmoved


def _call_int8(op, x, main, bias, constants, out_factor):
    check_factor("out_factor", out_factor, constants[0])
    check_no_gradient(x, main, bias, out_factor)
    return op(x, main, bias, *constants, out_factor)


def unshuffle_average_add(
    x: torch.Tensor | None, main: torch.Tensor, bias: torch.Tensor | None = None, factor: int = 2
) -> torch.Tensor:
    """unshuffle_average(x) + main + bias: the down-sampling shortcut, added to the main branch.

    x: [B, C, H, W]; without x only main is computed. main: [B, O, H / factor, W / factor], or [B, O / factor², H, W],
    which is unshuffled; bias: one element for each channel of main. Output channel o is the average of factor² C / O
    consecutive channels of pixel_unshuffle(x). Returns [B, O, H / factor, W / factor] channels-last. Raises ValueError
    on shapes that do not fit.
    """
    return unshuffle_average_add_op(x, main, bias, *_average_constants(x, main, bias, factor))


def unshuffle_average_add_int8(
    x: torch.Tensor | None, main: torch.Tensor, bias: torch.Tensor | None, out_factor: torch.Tensor, factor: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of `unshuffle_average_add`, and the same times out_factor, [O] fp32, as int8; for inference.

    Raises ValueError as `unshuffle_average_add` does and for other factors, RuntimeError if a tensor requires a
    gradient.
    """
    constants = _average_constants(x, main, bias, factor)
    return _call_int8(unshuffle_average_add_int8_op, x, main, bias, constants, out_factor)


def _average_constants(x, main, bias, factor):
    """out_channels, factor and scale of the operator."""
    height, width = (main if x is None else x).shape[2:]
    unmoved = _check(x, main, bias, factor, (height // factor, width // factor))
    out_channels = main.shape[1] * factor**2 if unmoved else main.shape[1]
    if height % factor or width % factor:
        raise ValueError(f"the size {height}x{width} is not a multiple of factor={factor}")
    if x is not None and factor**2 * x.shape[1] % out_channels:
        raise ValueError(f"x's {x.shape[1]} channels * {factor}² cannot be divided into {out_channels} equal groups")
    return out_channels, factor, 1.0 if x is None else out_channels / (factor**2 * x.shape[1])


def duplicate_shuffle_add(
    x: torch.Tensor | None, main: torch.Tensor, bias: torch.Tensor | None = None, factor: int = 2
) -> torch.Tensor:
    """duplicate_shuffle(x) + main + bias: the up-sampling shortcut, added to the main branch.

    x: [B, C, H, W]; without x only main is computed. main: [B, O, H * factor, W * factor], or [B, O * factor², H, W],
    which is shuffled, or with factor 2 the planes [4 B, O, H, W]; bias: one element for each channel of main. Each
    channel of x is repeated factor² O / C times, one copy after the other, before the shuffle. Returns
    [B, O, H * factor, W * factor] channels-last. Raises ValueError on shapes that do not fit.
    """
    return duplicate_shuffle_add_op(x, main, bias, *_duplicate_constants(x, main, bias, factor))


def duplicate_shuffle_add_int8(
    x: torch.Tensor | None, main: torch.Tensor, bias: torch.Tensor | None, out_factor: torch.Tensor, factor: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of `duplicate_shuffle_add`, and the same times out_factor, [O] fp32, as int8; for inference.

    Raises ValueError as `duplicate_shuffle_add` does and for other factors, RuntimeError if a tensor requires a
    gradient.
    """
    constants = _duplicate_constants(x, main, bias, factor)
    return _call_int8(duplicate_shuffle_add_int8_op, x, main, bias, constants, out_factor)


def _duplicate_constants(x, main, bias, factor):
    """out_channels, factor and scale of the operator."""
    height, width = (main if x is None else x).shape[2:]
    unmoved = _check(x, main, bias, factor, (height * factor, width * factor), planes=factor == 2)
    unmoved = unmoved and not _are_planes(x, main)
    out_channels = main.shape[1] // factor**2 if unmoved else main.shape[1]
    if unmoved and main.shape[1] % factor**2:
        raise ValueError(f"main's {main.shape[1]} channels are not a multiple of factor²={factor**2}")
    if x is not None and factor**2 * out_channels % x.shape[1]:
        raise ValueError(f"{out_channels} * {factor}² channels are not a multiple of x's {x.shape[1]}")
    return out_channels, factor, 1.0
