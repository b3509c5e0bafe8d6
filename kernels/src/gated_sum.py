"""x + gate · branch for tokens [B, N, D], with a gate [B, D] for each image; and the gradients of branch and gate."""

import torch
import triton.language as tl

from .common import cdiv, persistent_splits, promoted, row_tile
from .launch import Kernel

MOST_COLUMNS = 256  # of a tile, so that little of a width such as 2240 or 1152 is masked


@Kernel
def _gated_sum_kernel(
    x_ptr, gate_ptr, branch_ptr, out_ptr, tokens, width, blocks, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The grid is (images · blocks of an image's tokens, blocks of columns)."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < width
    mask = (token < tokens)[:, None] & d_mask[None, :]
    offset = (image * tokens + token)[:, None] * width + d[None, :]
    gate = tl.load(gate_ptr + image * width + d, d_mask, 0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    branch = tl.load(branch_ptr + offset, mask, 0.0).to(tl.float32)
    tl.store(out_ptr + offset, (x + gate * branch).to(out_ptr.dtype.element_ty), mask)


@Kernel
def _gated_sum_backward_kernel(
    dy_ptr, gate_ptr, branch_ptr, dbranch_ptr, partial_ptr, tokens, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dbranch, and partial sums of dgate to partial [images, splits, width].

    The grid is (images, splits of an image's tokens, blocks of columns).
    """
    image, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < width
    gate = tl.load(gate_ptr + image * width + d, d_mask, 0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(split, tl.cdiv(tokens, BLOCK_ROWS), splits):
        token = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (token < tokens)[:, None] & d_mask[None, :]
        offset = (image * tokens + token)[:, None] * width + d[None, :]
        dy = tl.load(dy_ptr + offset, mask, 0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offset, mask, 0.0).to(tl.float32)
        tl.store(dbranch_ptr + offset, (dy * gate[None, :]).to(dbranch_ptr.dtype.element_ty), mask)
        dgate += tl.sum(dy * branch, 0)
    tl.store(partial_ptr + (image * splits + split) * width + d, dgate, d_mask)


def launch_gated_sum(x, gate, branch):
    images, tokens, width = x.shape
    out = torch.empty_like(x, dtype=torch.promote_types(promoted(x, branch), gate.dtype))
    if x.numel():
        block_rows, block_d = row_tile(width, MOST_COLUMNS)
        blocks = cdiv(tokens, block_rows)
        _gated_sum_kernel[(images * blocks, cdiv(width, block_d))](
            x, gate, branch, out, tokens, width, blocks, BLOCK_ROWS=block_rows, BLOCK_D=block_d
        )
    return out


def launch_gated_sum_backward(dy, gate, branch):
    images, tokens, width = dy.shape
    dbranch = torch.empty_like(branch)
    if not dy.numel():
        return dbranch, torch.zeros_like(gate)
    block_rows, block_d = row_tile(width, MOST_COLUMNS)
    blocks = cdiv(width, block_d)
    splits = persistent_splits(dy, cdiv(tokens, block_rows), images * blocks, per_processor=8)
    partial = torch.empty(images, splits, width, dtype=torch.float32, device=dy.device)
    _gated_sum_backward_kernel[(images, splits, blocks)](
        dy, gate, branch, dbranch, partial, tokens, width, BLOCK_ROWS=block_rows, BLOCK_D=block_d
    )
    return dbranch, partial.sum(1).to(gate.dtype)
