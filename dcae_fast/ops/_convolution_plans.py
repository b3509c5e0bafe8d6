"""Plans of cuDNN for convolutions with an epilogue."""

from collections.abc import Callable

import torch

from . import _plans
from ._library import cuda_extension

RULES = 2  # version of the rules that choose candidates: part of the cache file's name
CUDNN = _plans.Library("cuDNN", "convolutions", lambda: f"{torch.backends.cudnn.version()}-{RULES}")
WORTH_A_SEARCH = 5e7  # multiplications; the smallest convolution of the released models at 512 pixels has 7.5e7

Epilogue = list[tuple[str, torch.Tensor | None]]


def available() -> bool:
    """Whether the CUDA extension was built with cuDNN, and cuDNN is enabled in torch."""
    return hasattr(cuda_extension(), "Convolution") and torch.backends.cudnn.enabled


def shape_of(
    x: torch.Tensor, weight: torch.Tensor, stride: int, padding: tuple[int, int, int, int], epilogue: Epilogue
) -> tuple:
    """Everything that a plan depends on besides the GPU."""
    steps = tuple((step, None if operand is None else operand.dtype) for step, operand in epilogue)
    return x.dtype, tuple(x.shape), tuple(weight.shape), stride, padding, steps


def find(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    padding: tuple[int, int, int, int],
    epilogue: Epilogue,
    fallback: Callable[[], object],
    then: Callable[[torch.Tensor], object] = lambda y: y,
):
    """The ConvolutionPlan for tensors like these; None if `fallback` does the same work as the plan and `then` faster.

    epilogue: (step, its operand or None) in order, as in csrc/plans/convolution.h. None is also the answer for a new
    shape while a CUDA graph is captured, and for tiny ones.
    """
    operands = [operand for _, operand in epilogue if operand is not None]
    return _plans.find(
        CUDNN,
        shape_of(x, weight, stride, padding, epilogue),
        x.device,
        _products(x, weight, stride) >= WORTH_A_SEARCH,
        lambda: cuda_extension().Convolution(x, weight, stride, padding, epilogue),
        lambda plan: then(plan(x, weight, operands)),
        fallback,
    )


def _products(x: torch.Tensor, weight: torch.Tensor, stride: int) -> float:
    """About the number of multiplications of a convolution."""
    return x.numel() // x.shape[1] * weight.numel() / stride**2
