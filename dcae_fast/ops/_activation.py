"""The activations that kernels fuse, and their gradients, in plain PyTorch."""

import torch
import torch.nn.functional as F

ACTIVATIONS = ("none", "relu", "silu")


def check_activation(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}; expected one of {ACTIVATIONS}")


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    return {"none": torch.Tensor.clone, "relu": F.relu, "silu": F.silu}[act](x)


def activate_backward(x: torch.Tensor, dy: torch.Tensor, act: str) -> torch.Tensor:
    """dy * act'(x)."""
    if act == "silu":
        s = torch.sigmoid(x)
        return dy * s * (1 + x * (1 - s))
    return dy * (x > 0) if act == "relu" else dy.clone()


def sum_to_channels(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] → [C]."""
    return x.sum((0, 2, 3))
