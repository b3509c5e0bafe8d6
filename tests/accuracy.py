"""What the tests of operators share about errors: how large one is, and how large it may be."""

import torch

CEILING = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of kernels


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """‖got - exact‖ / ‖exact‖; exact: float64."""
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def allowed(eager_error: float, dtype: torch.dtype, by_kernel: bool = True) -> float:
    """The largest relative error of a result of this type: twice eager's on the same machine, or some roundings.

    by_kernel: a kernel of this project keeps below CEILING, too. PyTorch's own results need not: it rounds differently
    from processor to processor.
    """
    limit = max(2 * eager_error, min(4 * torch.finfo(dtype).eps, CEILING[dtype]))
    return min(limit, CEILING[dtype]) if by_kernel else limit
