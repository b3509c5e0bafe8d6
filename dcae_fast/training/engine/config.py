"""The options of every training: the recipe decides the weights, the run says where and how to compute them.

PyTorch is not imported.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dcae_fast.workers import default_workers


class TrainingError(RuntimeError):
    """A training that cannot begin or continue; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options that decide the weights. Of these, only `steps` may change when a run is resumed."""

    batch: int
    """items per step, summed over all ranks and accumulated parts"""
    steps: int
    """number of steps of the whole training; may change when a run is resumed"""
    seed: int = 0
    """seed of the initial weights, the data order and all random draws"""
    lr_decay: Literal["cosine"] | None = None
    """cosine: after the warm-up, the learning rate falls to 0 at the last of the `steps`; None: it stays constant"""

    def __post_init__(self):
        check_least(self, {"batch": 1, "steps": 0, "seed": 0})

    @property
    def lr_ends(self) -> int | None:
        """The step at which the learning rate reaches 0; None if it does not decay."""
        return self.steps if self.lr_decay else None

    def part(self, ranks: int, accumulate: int) -> int:
        """The number of items that a rank computes at once. ValueError if the batch cannot be divided."""
        if self.batch % (ranks * accumulate):
            raise ValueError(
                f"batch={self.batch}; expected a multiple of {ranks * accumulate}, {ranks} ranks x accumulate="
                f"{accumulate}"
            )
        return self.batch // (ranks * accumulate)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and how to compute a recipe. All of these except `out` may change when a run is resumed."""

    out: Path
    """output folder; resumes the run it contains, if any"""
    device: str | None = None
    """PyTorch device; by default CUDA if available, else the CPU. Under torchrun each rank takes its own GPU"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """with several ranks: replicate the weights (DDP), or shard weights, gradients, optimizer and average (FSDP2)"""
    accumulate: int = 1
    """number of parts into which each rank splits its share of the batch; gradients are accumulated over the parts"""
    patch: bool = True
    """use the fast operators"""
    compile: bool = False
    """use torch.compile: for the whole network on one rank, block by block on several ranks"""
    checkpoint_activations: bool = False
    """recompute each block in the backward pass instead of storing its activations"""
    workers: int = field(default_factory=default_workers)
    """number of processes per rank that read data"""
    log_steps: int = 50
    """steps between two lines of the log"""
    save_steps: int = 1000
    """steps between two checkpoints"""
    keep: int = 2
    """number of checkpoints to keep"""
    sample_steps: int = 20_000
    """steps between two pictures of samples; 0 for no pictures"""
    eval_steps: int = 20_000
    """steps between two evaluations"""
    tensorboard: bool = False
    """also log to TensorBoard, in the output folder"""
    wandb: str | None = None
    """also log to this project of Weights & Biases"""

    def __post_init__(self):
        check_least(self, dict.fromkeys(("accumulate", "log_steps", "save_steps", "keep", "eval_steps"), 1))
        check_least(self, {"workers": 0, "sample_steps": 0})
        if self.workers > 4096:
            raise ValueError(f"workers={self.workers}; expected at most 4096")


def check_least(settings: Any, least: dict[str, int]) -> None:
    """ValueError unless each named field of `settings` is at least its bound, and finite or less than 2**63."""
    for name, bound in least.items():
        value = getattr(settings, name)
        most, told = (2**63, "less than 2**63") if isinstance(value, int) else (math.inf, "a finite number")
        if not bound <= value < most:
            raise ValueError(f"{name}={value}; expected {told if value > bound else f'at least {bound}'}")


def check_update(recipe: Any) -> None:
    """ValueError unless the fields `betas`, `clip_grad` and `ema_decay` of a recipe have values that a step can use."""
    if not all(0 <= beta < 1 for beta in recipe.betas):
        raise ValueError(f"betas={recipe.betas}; expected two numbers of at least 0, and less than 1")
    if recipe.clip_grad is not None and not recipe.clip_grad > 0:
        raise ValueError(f"clip_grad={recipe.clip_grad}; expected more than 0, or None")
    if recipe.ema_decay is not None and not 0 < recipe.ema_decay < 1:
        raise ValueError(f"ema_decay={recipe.ema_decay}; expected between 0 and 1, or None")
