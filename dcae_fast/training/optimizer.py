"""AdamW, and the learning rate and the parts of the gradient that the original's trainer gives it."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .config import Recipe


def decayed(name: str) -> bool:
    """Whether a parameter of that name decays. As in the original, norm1.weight, norm2.weight and tables do."""
    return "norm.weight" not in name and "bias" not in name


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Fused AdamW over what is trained, without weight decay where the name says so."""
    groups = [
        {
            "params": [p for name, p in network.named_parameters() if p.requires_grad and decayed(name) == decay],
            "weight_decay": recipe.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Of step 1, 2, ...: w + (lr - w) step / W up to step W, then lr; W = warmup_steps, w = warmup_lr."""
    if step >= recipe.warmup_steps:
        return recipe.lr
    return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / recipe.warmup_steps


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """L2, over all parameters and, where they are sharded, all ranks."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
