"""Activations and their gradients, checks of biases and residuals, and sums over channels, for several operators."""

import torch
import torch.nn.functional as F

ACTIVATIONS = ("none", "relu", "silu")


def check_activation(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r}; expected one of {ACTIVATIONS}")


def check_filters(weight: torch.Tensor, **parameters: torch.Tensor | None) -> None:
    """Raises ValueError unless each parameter is None or has one element for each filter of the weight."""
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != weight.shape[:1]:
            raise ValueError(f"{name} is {list(parameter.shape)}; expected [{weight.shape[0]}], one for each filter")


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    return {"none": torch.Tensor.clone, "relu": F.relu, "silu": F.silu}[act](x)


def activate_backward(x: torch.Tensor, dy: torch.Tensor, act: str) -> torch.Tensor:
    """dy * act'(x)."""
    if act == "silu":
        s = torch.sigmoid(x)
        return dy * s * (1 + x * (1 - s))
    return dy.masked_fill(x <= 0, 0) if act == "relu" else dy.clone()


def sum_to_channels(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] → [C]."""
    return x.sum((0, 2, 3))


def sum_dtype(x: torch.Tensor, residual: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.dtype:
    """The type of x.to(dtype) + residual. Raises ValueError unless x and residual have the same shape."""
    dtype = dtype or x.dtype
    if residual is None:
        return dtype
    if residual.shape != x.shape:
        raise ValueError(f"residual is {list(residual.shape)}; expected x's {list(x.shape)}")
    return torch.promote_types(dtype, residual.dtype)
