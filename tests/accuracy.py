"""Relative errors and their limits, shared by the tests of operators."""

import torch

CEILING = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # largest relative errors of kernels


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """‖got - exact‖ / ‖exact‖; exact: float64."""
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def allowed(eager_error: float, dtype: torch.dtype, by_kernel: bool = True) -> float:
    """The largest allowed relative error of a result in this dtype: twice eager's error, or a few roundings.

    by_kernel: the error of a kernel of this project must also stay below `CEILING`. PyTorch's own results need not:
    PyTorch rounds differently on each processor.
    """
    limit = max(2 * eager_error, min(4 * torch.finfo(dtype).eps, CEILING[dtype]))
    return min(limit, CEILING[dtype]) if by_kernel else limit
