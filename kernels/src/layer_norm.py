"""Layer norm of tokens, after adding a gated branch to them if there is one. A program computes whole tokens.

Either all images share scale and shift, or each image has its own. The gate of a branch differs for each image.
"""

import torch
import triton
import triton.language as tl

from .common import cdiv, persistent_splits, promoted, row_tile
from .launch import Kernel


@triton.jit
def _normalise(x, mask, width, eps):
    """norm(x) and 1 / standard deviation of each row; zero where masked."""
    x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    return x * rstd[:, None], rstd


@Kernel
def _layer_norm_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, branch_ptr, gate_ptr, sum_ptr, y_ptr, rows, tokens, width, eps,
    OF_IMAGE: tl.constexpr, HAS_BRANCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < width
    mask = (row < rows)[:, None] & d_mask[None, :]
    offset = row[:, None] * width + d[None, :]
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    if OF_IMAGE:
        of_image = (row // tokens)[:, None] * width + d[None, :]
        scale = 1.0 + tl.load(scale_ptr + of_image, mask, 0.0).to(tl.float32)
        shift = tl.load(shift_ptr + of_image, mask, 0.0).to(tl.float32)
    else:
        scale = tl.load(scale_ptr + d, d_mask, 0.0).to(tl.float32)[None, :]
        shift = tl.load(shift_ptr + d, d_mask, 0.0).to(tl.float32)[None, :]
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + (row // tokens)[:, None] * width + d[None, :], mask, 0.0).to(tl.float32)
        total = x + gate * tl.load(branch_ptr + offset, mask, 0.0).to(tl.float32)
        total = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offset, total, mask)
        x = total.to(tl.float32)
    x_hat, _ = _normalise(x, mask, width, eps)
    y = x_hat * scale + shift
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask)


@Kernel
def _layer_norm_backward_kernel(
    dy_ptr, dsum_ptr, sum_ptr, scale_ptr, branch_ptr, gate_ptr, dx_ptr, dbranch_ptr, partial_ptr,
    tokens, width, eps,
    OF_IMAGE: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_BRANCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dx and dbranch, and partial sums of dscale, dshift and dgate to partial [3, images, splits, width].

    The grid is (images, splits of an image's tokens). If all images share scale and shift, their tokens count as those
    of one image.
    """
    image, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, BLOCK_D)
    d_mask = d < width
    scale = tl.load(scale_ptr + image * width + d, d_mask, 0.0).to(tl.float32)
    if OF_IMAGE:
        scale += 1.0
    if HAS_BRANCH:
        gate = tl.load(gate_ptr + image * width + d, d_mask, 0.0).to(tl.float32)
    dscale = tl.zeros((BLOCK_D,), tl.float32)
    dshift = tl.zeros((BLOCK_D,), tl.float32)
    dgate = tl.zeros((BLOCK_D,), tl.float32)
    for block in range(split, tl.cdiv(tokens, BLOCK_ROWS), splits):
        token = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (token < tokens)[:, None] & d_mask[None, :]
        offset = (image * tokens + token)[:, None] * width + d[None, :]
        x = tl.load(sum_ptr + offset, mask, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask, 0.0).to(tl.float32)
        x_hat, rstd = _normalise(x, mask, width, eps)
        dx_hat = dy * scale[None, :]
        along, across = tl.split(tl.sum(tl.join(dx_hat * x_hat, dx_hat), 1) / width)  # one reduction for both
        dx = (dx_hat - across[:, None] - x_hat * along[:, None]) * rstd[:, None]
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + offset, mask, 0.0).to(tl.float32)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)
        if HAS_BRANCH:
            branch = tl.load(branch_ptr + offset, mask, 0.0).to(tl.float32)
            dbranch = dx * gate[None, :]
            tl.store(dbranch_ptr + offset, dbranch.to(dbranch_ptr.dtype.element_ty), mask)
            dgate += tl.sum(tl.where(mask, dx * branch, 0.0), 0)
        dscale += tl.sum(dy * x_hat, 0)
        dshift += tl.sum(dy, 0)
    partial = partial_ptr + (image * splits + split) * width + d
    size = tl.num_programs(0).to(tl.int64) * splits * width
    tl.store(partial, dscale, d_mask)
    tl.store(partial + size, dshift, d_mask)
    if HAS_BRANCH:
        tl.store(partial + 2 * size, dgate, d_mask)


def _backward_elements(total, branch):
    """Elements of a tile: the fastest size on an H200 among the sizes whose registers do not spill."""
    if total.shape[2] <= 1024:
        return 1024
    if branch is not None:
        return 4096
    return 8192 if total.element_size() == 2 else 2048


def launch_layer_norm(x, scale, shift, eps, branch, gate, dtype):
    images, tokens, width = x.shape
    if branch is None:
        total = x.new_empty(0)
    else:
        total = torch.empty_like(x, dtype=torch.promote_types(promoted(x, branch), gate.dtype))
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        wide = 8192 if branch is None else 2048
        block_rows, block_d = row_tile(width, width, elements=4096 if width <= 1024 else wide)
        _layer_norm_forward_kernel[(cdiv(images * tokens, block_rows),)](
            x, scale, shift, branch, gate, total, y, images * tokens, tokens, width, eps,
            OF_IMAGE=scale.dim() == 2, HAS_BRANCH=branch is not None, BLOCK_ROWS=block_rows, BLOCK_D=block_d,
            num_warps=max(4, block_d // 512),
        )  # fmt: skip
    return total, y


def launch_layer_norm_backward(dy, dsum, total, scale, branch, gate, eps, dtype):
    images, tokens, width = total.shape if scale.dim() == 2 else (1, total.shape[0] * total.shape[1], total.shape[2])
    dx = torch.empty_like(total, dtype=dtype)
    dbranch = torch.empty_like(branch) if branch is not None else total.new_empty(0)
    block_rows, block_d = row_tile(width, width, _backward_elements(total, branch))
    splits = persistent_splits(total, cdiv(tokens, block_rows), images, per_processor=8)
    sums = 2 if branch is None else 3
    partial = torch.empty(sums, images, splits, width, dtype=torch.float32, device=total.device)
    if total.numel():
        _layer_norm_backward_kernel[(images, splits)](
            dy, dsum, total, scale, branch, gate, dx, dbranch, partial, tokens, width, eps,
            OF_IMAGE=scale.dim() == 2, HAS_DSUM=dsum is not None, HAS_BRANCH=branch is not None,
            BLOCK_ROWS=block_rows, BLOCK_D=block_d, num_warps=max(1, block_d // 512),
        )  # fmt: skip
    dscale, dshift = (partial[i].sum(1).view_as(scale).to(scale.dtype) for i in range(2))
    dgate = total.new_empty(0) if gate is None else partial[2].sum(1).to(gate.dtype)
    return dx, dscale, dshift, dbranch, dgate
