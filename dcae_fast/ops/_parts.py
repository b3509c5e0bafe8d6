"""How a formula calls the operators that it is made of.

A formula over `via`, one of the functions below, is written once, as in `via(linear_op)(x, weight, bias, residual)`,
and serves three times: as a reference, as a composition of kernels, and as the gradient of a registered operator.
"""

from collections.abc import Callable

from ._library import Operator


def as_reference(op: Operator) -> Callable:
    """Plain PyTorch on any device, differentiable to any order."""
    return op.reference


def as_kernel(op: Operator) -> Callable:
    """The kernel, without autograd, for dense tensors on the current device."""
    return op.dense_kernel


def as_operator(op: Operator) -> Callable:
    """The registered operator."""
    return op
