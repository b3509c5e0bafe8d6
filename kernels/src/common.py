"""Shared code of the kernels: activations and their derivatives, products, and sizes of tiles and grids."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LEAST_SIDE = 16  # shortest side of a product's tile


@triton.jit
def sigmoid(x, EXACT: tl.constexpr = False):
    """EXACT: to the last bit or two of float32, as in PyTorch. Otherwise the error is a few times larger, which half
    precision does not show, for a third of the instructions.
    """
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x))
    elif EXACT:
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))
    else:
        return libdevice.fast_dividef(1.0, 1.0 + libdevice.fast_expf(-x))


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN, as in PyTorch."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACT: tl.constexpr, EXACT: tl.constexpr = False):
    if ACT == "silu":
        return x * sigmoid(x, EXACT)
    elif ACT == "relu":
        return relu(x)
    else:
        return x


@triton.jit
def activate_backward(x, dy, ACT: tl.constexpr, EXACT: tl.constexpr = False):
    """dy * act'(x)."""
    if ACT == "silu":
        s = sigmoid(x, EXACT)
        return dy * s * (1.0 + x * (1.0 - s))
    elif ACT == "relu":
        return tl.where(x <= 0.0, 0.0, dy)
    else:
        return dy


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32. a is rounded to b's type. Products of float32 have float32 accuracy."""
    if INTERPRETED:  # the interpreter has no product of bfloat16, and truncates to bfloat16 where a GPU rounds
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a.to(b.dtype), b, acc, input_precision="tf32x3")


@triton.jit
def halves(x):
    """The left and the right half of the columns of a matrix."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def parts(x, COUNT: tl.constexpr):
    """The columns of a matrix in COUNT parts: 1, 2, 4 or 8."""
    if COUNT == 1:
        return (x,)
    elif COUNT == 2:
        return halves(x)
    elif COUNT == 4:
        left, right = halves(x)
        return halves(left) + halves(right)
    else:
        left, right = halves(x)
        first, second = halves(left)
        third, fourth = halves(right)
        return halves(first) + halves(second) + halves(third) + halves(fourth)


def like_channels_last(
    x: torch.Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised channels-last tensor on x's device, with x's shape and dtype unless others are given."""
    return torch.empty(shape or x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def promoted(x: torch.Tensor | None, y: torch.Tensor | None) -> torch.dtype:
    """The dtype of x + y. One of them may be None."""
    if x is None or y is None:
        return (y if x is None else x).dtype
    return torch.promote_types(x.dtype, y.dtype)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own functions of this name and the next are slow outside kernels."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n > 0."""
    return 1 << (n - 1).bit_length()


def rows_of(x: torch.Tensor) -> int:
    """The number of positions of [B, C, H, W], which are the rows of its channels-last matrix."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def row_tile(channels: int, most_channels: int, elements: int = 4096) -> tuple[int, int]:
    """(rows, channels) of a tile of about `elements` elements, with all channels, but at most `most_channels`."""
    block = next_power_of_2(min(channels, most_channels))
    return max(1, elements // block), block


def persistent_splits(x: torch.Tensor, tiles: int, independent: int = 1, per_processor: int = 4) -> int:
    """The number of programs to split a loop over `tiles` into, when `independent` such loops run side by side.

    per_processor: programs of all loops together for each multiprocessor.
    """
    programs = per_processor * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    return min(tiles, max(1, programs // max(independent, 1)))


class Chip(NamedTuple):
    """Limits of the tiles of a product, in bytes.

    shared_memory: available to a program; half, single: taken there by an operand's element of that precision.
    """

    shared_memory: int
    half: int
    single: int


TURING = Chip(64 * 1024, half=4, single=4)  # Triton computes products in float32 on Turing
ADA = Chip(99 * 1024, half=2, single=8)  # and in tf32x3, which splits a float32, on later GPUs


def chips(x: torch.Tensor) -> tuple[Chip, ...]:
    """The chip of x's GPU. Without a GPU, the chips with the least memory, so that tiles fit into all."""
    return _chips(x.get_device()) if x.is_cuda else (TURING, ADA)


@functools.cache
def _chips(index: int) -> tuple[Chip, ...]:
    limit = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    kind = TURING if limit <= TURING.shared_memory else ADA
    return (kind._replace(shared_memory=limit),)


def fitting(
    x: torch.Tensor, itemsize: int, sides: tuple[int, ...], needed: Callable[..., int]
) -> tuple[int, ...] | None:
    """The sides of a product's tiles, the longest halved until the tiles fit into shared memory; None if none fit.

    itemsize: of the operands. needed(size, *sides): bytes of shared memory if an operand's element takes `size` bytes.
    """

    def fits(chip: Chip) -> bool:
        return needed(chip.half if itemsize == 2 else chip.single, *sides) <= chip.shared_memory

    while not all(map(fits, chips(x))):
        longest = max(range(len(sides)), key=sides.__getitem__)
        if sides[longest] <= LEAST_SIDE:
            return None
        sides = *sides[:longest], sides[longest] // 2, *sides[longest + 1 :]
    return sides
