"""What samplers and losses take, and the checks of it."""

from collections.abc import Callable

import torch

Model = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (x, t [B], labels [B])
Network = Callable[[torch.Tensor, float], torch.Tensor]  # (x, t)


def check(noise: torch.Tensor, steps: int, least: int, most: int | None = None) -> None:
    """ValueError unless noise is float32 or float64 and least <= steps <= most."""
    if noise.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise is {noise.dtype}; float32 or float64 expected. For a faster network, use autocast")
    if steps < least or (most is not None and steps > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"steps={steps}; {expected} expected")
