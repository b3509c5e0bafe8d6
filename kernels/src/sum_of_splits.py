"""Adds the two sums that each split of a gradient's positions has written, in a fixed order and in one launch."""

import torch
import triton.language as tl

from .common import cdiv, next_power_of_2
from .launch import Kernel

WARPS = 8


def tile(splits: int) -> dict[str, int]:
    """A tile of at most 4096 sums: many splits of few channels, or all splits of more channels."""
    size = min(1024, next_power_of_2(max(splits, 1)))
    return {"SPLITS": size, "BLOCK_C": min(256, 4096 // size)}


@Kernel
def _sum_of_splits_kernel(
    partial_ptr, first_ptr, second_ptr, splits, channels, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    first = tl.zeros((SPLITS, BLOCK_C), tl.float32)
    second = tl.zeros((SPLITS, BLOCK_C), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & c_mask[None, :]
        partial = partial_ptr + split[:, None] * 2 * channels + c[None, :]
        first += tl.load(partial, mask, 0.0)
        second += tl.load(partial + channels, mask, 0.0)
    tl.store(first_ptr + c, tl.sum(first, 0).to(first_ptr.dtype.element_ty), c_mask)
    tl.store(second_ptr + c, tl.sum(second, 0).to(second_ptr.dtype.element_ty), c_mask)


def sum_of_splits(
    partial: torch.Tensor, first_dtype: torch.dtype, second_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """partial [splits, 2, C] in fp32 → two sums [C]. Zeros without splits."""
    splits, _, channels = partial.shape
    first, second = partial.new_empty(channels, dtype=first_dtype), partial.new_empty(channels, dtype=second_dtype)
    if channels:
        sides = tile(splits)
        _sum_of_splits_kernel[(cdiv(channels, sides["BLOCK_C"]),)](
            partial, first, second, splits, channels, **sides, num_warps=WARPS
        )
    return first, second
