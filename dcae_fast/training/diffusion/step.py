"""The state of training a transformer, its loss, and one step."""

from collections.abc import Callable
from functools import partial

import torch

from dcae_fast.models import diffusion_checkpoint
from dcae_fast.models.diffusion_zoo import DiffusionConfig
from dcae_fast.sampling import OBJECTIVES
from dcae_fast.training.engine.ema import MovingAverage
from dcae_fast.training.engine.optimizer import build_optimizer, learning_rate
from dcae_fast.training.engine.parallel import gradients_summed
from dcae_fast.training.engine.state import Export, State, Trained, autocast

from .config import DiffusionRecipe, DiffusionRun
from .draws import Draws
from .network import build_network, parallelize

NAME = "transformer"  # in State.networks

Part = tuple[torch.Tensor, torch.Tensor, Draws]  # latents [b, c, h, w], labels [b], and their draws


def initial_state(config: DiffusionConfig, recipe: DiffusionRecipe, run: DiffusionRun, device: torch.device) -> State:
    """The state before the first step; the transformer is exported for `DCAEDiffusion.from_pretrained`."""
    network = build_network(config, recipe.seed, device)
    called = parallelize(network, run, recipe.of_blocks)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    average = MovingAverage(network, recipe.ema_decay) if recipe.ema_decay else None
    optimizer = build_optimizer(network, recipe.lr, recipe.betas, recipe.weight_decay)
    save = partial(diffusion_checkpoint.save_state, config)
    export = Export(NAME, save, diffusion_checkpoint.FILES[0], diffusion_checkpoint.PREFIX)
    return State({NAME: Trained(network, called, optimizer, scaler)}, export, average)


def batch_loss(
    config: DiffusionConfig, network: Callable, z: torch.Tensor, labels: torch.Tensor, draws: Draws
) -> torch.Tensor:
    """The mean objective of latents z [b, c, h, w] with labels [b], some of which are dropped."""
    labels = torch.where(draws.dropped, config.network.num_classes, labels)
    return OBJECTIVES[config.train_scheduler].loss(network, z, labels, draws.t, draws.noise)


def take_step(
    state: State, config: DiffusionConfig, recipe: DiffusionRecipe, parts: list[Part], want_norm: bool
) -> tuple[torch.Tensor, float, torch.Tensor | None]:
    """Takes the step after `state.step` on this rank's share of the batch, one part of it after another.

    Returns the mean loss of the share; the learning rate; and, if wanted or clipped, the norm of the gradient before
    clipping. The tensors are on the device.
    """
    trained, step, losses = state.networks[NAME], state.step + 1, []
    for number, (z, labels, draws) in enumerate(parts):
        with gradients_summed(trained.called, last=number == len(parts) - 1):
            with autocast(z.device, recipe.autocast):
                loss = batch_loss(config, trained.called, z, labels, draws) / len(parts)
            trained.backward(loss)
        losses.append(loss.detach())
    lr = learning_rate(step, recipe.lr, recipe.warmup_steps, recipe.warmup_lr, recipe.lr_ends)
    norm = trained.update(lr, recipe.clip_grad, want_norm)
    if state.average is not None:
        state.average.update(trained.network, step)
    return torch.stack(losses).sum(), lr, norm
