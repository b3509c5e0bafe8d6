"""All that a training changes, and one step of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.models.dit import DiT
from dcae_fast.models.uvit import UViT
from dcae_fast.reconstruction import DTYPES
from dcae_fast.sampling import OBJECTIVES

from .batches import Draws
from .config import Recipe, Run
from .ema import MovingAverage
from .optimizer import build_optimizer, gradient_norm, learning_rate
from .parallel import build_network, gradients_summed, spread


@dataclass
class State:
    """network: the weights, under its own names; called: the module that computes them; step: how many were taken."""

    config: DiffusionConfig
    network: UViT | DiT
    called: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: MovingAverage | None
    step: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def initial_state(config: DiffusionConfig, recipe: Recipe, run: Run, device: torch.device) -> State:
    network = build_network(config, recipe.seed, device)
    called = spread(network, run)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    average = MovingAverage(network, recipe.ema_decay) if recipe.ema_decay else None
    return State(config, network, called, build_optimizer(network, recipe), scaler, average)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Without its cache of rounded weights: in a forward pass each is used once, and blocks may not want to keep it."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32", cache_enabled=False)


def batch_loss(
    config: DiffusionConfig, network: Callable, z: torch.Tensor, labels: torch.Tensor, draws: Draws
) -> torch.Tensor:
    """The objective of latents, some of whose labels are dropped."""
    labels = torch.where(draws.dropped, config.network.num_classes, labels)
    return OBJECTIVES[config.train_scheduler].loss(network, z, labels, draws.t, draws.noise)


def take_step(
    state: State, recipe: Recipe, parts: list[tuple[torch.Tensor, torch.Tensor, Draws]], want_norm: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One step on this rank's part of the batch, itself in parts that are computed one after another.

    Returns the mean loss of the rank's latents and, if wanted or clipped, the norm of the gradient before clipping;
    both on the device.
    """
    state.step += 1
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, state.step)
    losses = []
    for number, (z, labels, draws) in enumerate(parts):
        with gradients_summed(state.called, last=number == len(parts) - 1):
            with autocast(z.device, recipe.precision):
                loss = batch_loss(state.config, state.called, z, labels, draws) / len(parts)
            with torch.autograd.set_multithreading_enabled(False):  # Python functions take longer in another thread
                state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.network.parameters()) if want_norm or recipe.clip_grad else None
    if recipe.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(state.network.parameters(), recipe.clip_grad, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.average is not None:
        state.average.update(state.network, state.step)
    return torch.stack(losses).sum(), norm
