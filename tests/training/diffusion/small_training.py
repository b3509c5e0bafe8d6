"""A training that takes a second: a UViT of two blocks on sixty random latents of three classes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from trainings import run_until

from dcae_fast.training.diffusion.config import RECIPES, Architecture, DiffusionRecipe, DiffusionRun
from dcae_fast.training.diffusion.task import DiffusionTask
from dcae_fast.training.engine.loop import Training

CPU = torch.device("cpu")
ITEMS, SHAPE = 60, (64, 2, 2)  # latents of dc-ae-tiny for pictures of 64 pixels
RECIPE = replace(
    RECIPES["uvit-h-f64"],
    network=Architecture(kind="uvit", depth=2, hidden_size=32, num_heads=2, num_classes=3),
    autoencoder="dc-ae-tiny",
    num_inference_steps=2,
    batch=8,
    steps=12,
    lr=1e-2,
    warmup_steps=5,
    precision="float32",
)


def save_latents(folder: Path, items: int = ITEMS, shape: tuple[int, ...] = SHAPE) -> None:
    """Files as the original writes them. Each class has its own mean, so that there is something to learn."""
    rng = np.random.default_rng(0)
    for index in range(items):
        file = folder / f"class{index % 3}" / f"{index:03d}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, (rng.normal(size=shape) * 0.3 + index % 3 - 1).astype(np.float32))


def run_in(folder: Path, **options) -> DiffusionRun:
    """A run with the latents beside its folder; not patched, as kernels are slow without a GPU."""
    defaults = {"device": "cpu", "patch": False, "workers": 0, "log_steps": 4, "save_steps": 4, "sample_steps": 0}
    return DiffusionRun(data=folder.parent / "latents", out=folder, **defaults | options)


def train_until(step: int, recipe: DiffusionRecipe, run: DiffusionRun, device: torch.device = CPU) -> None:
    run_until(step, Training(DiffusionTask(recipe, run, device)))
