"""What samplers and losses take, and the checks of it."""

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch

Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (x, t [B], labels [B])
Network = Callable[[torch.Tensor, float], torch.Tensor]  # (x, t)


def check(noise: torch.Tensor, steps: int, least: int, most: int = 100_000) -> None:
    """ValueError unless noise is float32 or float64 and least <= steps <= most; TypeError if steps is no integer."""
    if noise.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise is {noise.dtype}; float32 or float64 expected. For a faster network, use autocast")
    if not isinstance(steps, Integral):
        raise TypeError(f"steps={steps!r}; an integer expected")
    if not least <= steps <= most:
        raise ValueError(f"steps={steps}; {least} to {most} expected")


def check_guidance(scale: float, interval: tuple[float, float] | None, name: str = "scale") -> None:
    """TypeError or ValueError unless the scale is a finite number, and the interval two numbers lo <= hi, or None.

    name: of the scale, in the message.
    """
    if not isinstance(scale, Real):
        raise TypeError(f"{name}={scale!r}; a number expected")
    if not math.isfinite(scale):
        raise ValueError(f"{name}={scale}; a finite number expected")
    if interval is None:
        return
    if not isinstance(interval, tuple | list) or len(interval) != 2 or not all(isinstance(t, Real) for t in interval):
        raise TypeError(f"interval={interval!r}; two numbers (lo, hi) expected")
    if not interval[0] <= interval[1]:
        raise ValueError(f"interval={interval}; (lo, hi) with lo <= hi expected")
