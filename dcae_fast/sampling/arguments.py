"""Types of the arguments of samplers and losses, and checks of them."""

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch

Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (x, t [B], labels [B])
Network = Callable[[torch.Tensor, float], torch.Tensor]  # (x, t)


def check(noise: torch.Tensor, steps: int, least: int, most: int = 100_000) -> None:
    """ValueError unless noise is float32 or float64 and least <= steps <= most; TypeError if steps is no integer."""
    if noise.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise is {noise.dtype}; expected float32 or float64. For a faster network, use autocast")
    if not isinstance(steps, Integral):
        raise TypeError(f"steps={steps!r}; expected an integer")
    if not least <= steps <= most:
        raise ValueError(f"steps={steps}; expected {least} to {most}")


def check_guidance(scale: float, interval: tuple[float, float] | None, name: str = "scale") -> None:
    """Raise TypeError or ValueError unless scale is a finite number, and interval is None or (lo, hi) with lo <= hi.

    name: the name of the scale in the error.
    """
    if not isinstance(scale, Real):
        raise TypeError(f"{name}={scale!r}; expected a number")
    if not math.isfinite(scale):
        raise ValueError(f"{name}={scale}; expected a finite number")
    if interval is None:
        return
    if not isinstance(interval, tuple | list) or len(interval) != 2 or not all(isinstance(t, Real) for t in interval):
        raise TypeError(f"interval={interval!r}; expected two numbers (lo, hi)")
    if not interval[0] <= interval[1]:
        raise ValueError(f"interval={interval}; expected (lo, hi) with lo <= hi")
