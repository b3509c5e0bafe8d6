"""AdamW with the weight decay of the original's trainer, learning rates, and the norm of a gradient."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def decayed(name: str) -> bool:
    """Whether a parameter of that name decays. As in the original, norm1.weight, norm2.weight and tables do."""
    return "norm.weight" not in name and "bias" not in name


def build_optimizer(
    network: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW for the parameters that require a gradient; only those that `decayed` names have weight decay."""
    groups = [
        {
            "params": [p for name, p in network.named_parameters() if p.requires_grad and decayed(name) == decay],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate(step: int, lr: float, warmup_steps: int, warmup_lr: float, ends: int | None = None) -> float:
    """Learning rate of step 1, 2, ...

        w + (lr - w) step / W                          up to step W
        lr (1 + cos(pi (step - W) / (ends - W))) / 2   after step W

    W = warmup_steps, w = warmup_lr. If `ends` is None, it is lr after step W.
    """
    if step < warmup_steps:
        return warmup_lr + (lr - warmup_lr) * step / warmup_steps
    if ends is None or step == warmup_steps:
        return lr
    return lr * (1 + math.cos(math.pi * (step - warmup_steps) / (ends - warmup_steps))) / 2


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2 norm of the gradients of all parameters together; of sharded parameters, over all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
