"""Two tensors converted to a type and concatenated, in one pass: the input of the linear layer of a long skip.

    out = [left, right]

left, right: [B, N, D]; out: [B, N, 2 D], contiguous. PyTorch takes three passes: two conversions and a copy.
"""

import torch

from ._library import KERNEL_DTYPES, define, differentiable, differentiable_as


def concatenate_reference(left, right, dtype):
    return torch.cat([left.to(dtype), right.to(dtype)], -1)


def concatenate_backward_reference(dout, left_dtype, right_dtype):
    dleft, dright = dout.chunk(2, -1)
    return dleft.to(left_dtype, copy=True), dright.to(right_dtype, copy=True)


concatenate_op = define(
    "concatenate(Tensor left, Tensor right, ScalarType dtype) -> Tensor",
    concatenate_reference,
    lambda left, right, dtype: all(kind in KERNEL_DTYPES for kind in (left.dtype, right.dtype, dtype)),
    "concatenate",
)
concatenate_backward_op = define(
    "concatenate_backward(Tensor dout, ScalarType left_dtype, ScalarType right_dtype) -> (Tensor, Tensor)",
    concatenate_backward_reference,
    lambda dout, *dtypes: all(kind in KERNEL_DTYPES for kind in (dout.dtype, *dtypes)),
    "concatenate",
)


def _setup_context(ctx, inputs, output):
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx, dout):
    return *concatenate_backward_op(dout, *ctx.dtypes), None


differentiable(concatenate_op, _backward, _setup_context)
differentiable_as(concatenate_backward_op, concatenate_backward_reference)


def concatenate(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[left, right] along the last dimension, in `dtype`.

    left, right: [B, N, D]. Returns [B, N, 2 D], contiguous. Raises ValueError on other shapes.
    """
    if left.dim() != 3 or left.shape != right.shape:
        raise ValueError(f"left is {list(left.shape)}, right {list(right.shape)}: expected [B, N, D] twice")
    return concatenate_op(left, right, dtype)
