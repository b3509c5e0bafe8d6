"""Sum of tokens and a branch that each image scales by its own gate.

    y = x + gate · branch

x, branch, y: [B, N, D]; gate: [B, D]. Computed in fp32; y has the promoted type of the three. Before a norm, use
`layer_norm`, which computes the same sum in the pass of the norm. Source: adaLN of DiT (arXiv 2212.09748).

The gradients of branch and gate are one pass: dbranch = gate · dy, dgate = Σ_n branch · dy.
"""

import torch

from ._library import KERNEL_DTYPES, define, differentiable, differentiable_as


def _wide(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gated_sum_reference(x, gate, branch):
    dtype = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), gate.dtype)
    return (_wide(x) + _wide(gate)[:, None] * _wide(branch)).to(dtype)


def gated_sum_backward_reference(dy, gate, branch):
    wide = _wide(dy)
    return (wide * _wide(gate)[:, None]).to(branch.dtype), (wide * _wide(branch)).sum(1).to(gate.dtype)


def _accepts(*tensors):
    return all(tensor.dtype in KERNEL_DTYPES for tensor in tensors)


gated_sum_op = define(
    "gated_sum(Tensor x, Tensor gate, Tensor branch) -> Tensor", gated_sum_reference, _accepts, "gated_sum"
)
gated_sum_backward_op = define(
    "gated_sum_backward(Tensor dy, Tensor gate, Tensor branch) -> (Tensor, Tensor)",
    gated_sum_backward_reference,
    _accepts,
    "gated_sum",
)


def _setup_context(ctx, inputs, output):
    x, gate, branch = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(gate, branch)


def _backward(ctx, dy):
    wants_x, *wants = ctx.needs_input_grad
    dbranch, dgate = gated_sum_backward_op(dy, *ctx.saved_tensors) if any(wants) else (None, None)
    return dy.to(ctx.x_dtype) if wants_x else None, dgate, dbranch


differentiable(gated_sum_op, _backward, _setup_context)
differentiable_as(gated_sum_backward_op, gated_sum_backward_reference)


def gated_sum(x: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """x + gate · branch; see the head of this file.

    x, branch: [B, N, D]; gate: [B, D]. Returns [B, N, D], contiguous, in the promoted type. Raises ValueError on other
    shapes.
    """
    if x.dim() != 3 or branch.shape != x.shape or gate.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"x is {list(x.shape)}, gate {list(gate.shape)}, branch {list(branch.shape)}: expected [B, N, D], [B, D]"
            " and [B, N, D]"
        )
    return gated_sum_op(x, gate, branch)
