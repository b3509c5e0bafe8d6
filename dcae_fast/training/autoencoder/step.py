"""The state of training an autoencoder, its losses, and one step."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import dcae_fast
from dcae_fast import distributed
from dcae_fast.evaluation.pictures import channels_first
from dcae_fast.models import checkpoint
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.config import DCAEConfig
from dcae_fast.training.engine.ema import MovingAverage
from dcae_fast.training.engine.optimizer import build_optimizer, learning_rate
from dcae_fast.training.engine.parallel import apply_ddp, gradients_summed
from dcae_fast.training.engine.state import Export, State, Trained, autocast
from dcae_fast.training.engine.task import Taken

from .adversarial import adaptive_weight
from .config import AutoencoderRecipe, AutoencoderRun
from .critic import Critic
from .losses import SMALLEST, full_precision, perceptual_loss, pixel_loss
from .network import PartlyTrained, parallelize

NAME, CRITIC = "autoencoder", "discriminator"  # in State.networks


def initial_state(
    network: PartlyTrained, recipe: AutoencoderRecipe, run: AutoencoderRun, device: torch.device
) -> State:
    """The state before the first step. The network, on the device, is changed in place."""
    called = parallelize(network, recipe, run)
    networks = {NAME: _trained(network, called, recipe, recipe.lr)}
    if recipe.gan.gan_weight:
        torch.manual_seed(recipe.seed)
        critic = Critic(recipe.gan).to(device, memory_format=torch.channels_last)
        called = apply_ddp(critic) if distributed.is_distributed() else critic
        networks[CRITIC] = _trained(critic, called, recipe, recipe.critic_lr)
    average = MovingAverage(network, recipe.ema_decay) if recipe.ema_decay else None
    export = Export(NAME, partial(save_weights, network.config), checkpoint.WEIGHTS["original"][0], prefix="")
    return State(networks, export, average)


def _trained(network: nn.Module, called: nn.Module, recipe: AutoencoderRecipe, lr: float) -> Trained:
    device = next(network.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    return Trained(network, called, build_optimizer(network, lr, recipe.betas, recipe.weight_decay), scaler)


def save_weights(config: DCAEConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes a model with these weights in the original layout, for `DCAE.from_pretrained`."""
    with torch.device("meta"):
        model = DCAE(config)
    model.load_state_dict(tensors, assign=True)
    checkpoint.save(model, folder, "original")


class Objective:
    """The losses of the autoencoder.

    Raises TrainingError if the weights of the perceptual loss are missing, ValueError if crops are too small for it.

    patch: whether the perceptual loss uses the fast operators.
    """

    def __init__(self, recipe: AutoencoderRecipe, device: torch.device, patch: bool):
        self.recipe, self.pixel = recipe, pixel_loss(recipe.pixel)
        wanted = recipe.perceptual == "lpips" and recipe.perceptual_weight > 0
        if wanted and recipe.resolution < SMALLEST:
            raise ValueError(
                f"resolution={recipe.resolution}; expected at least {SMALLEST} for LPIPS, or --perceptual none"
            )
        self.perceptual: Callable | None = perceptual_loss(device) if wanted else None
        if self.perceptual is not None and patch:
            dcae_fast.patch(self.perceptual)

    def reconstruction(self, y: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of reconstructions y of pictures x, by name, without their weights."""
        losses = {"pixel": self.pixel(y, x)}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(y, x)
        return losses

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the losses of `reconstruction`."""
        total = losses["pixel"]
        if "perceptual" in losses:
            total = total + self.recipe.perceptual_weight * losses["perceptual"]
        return total


class Pair(NamedTuple):
    """Pictures and their reconstructions, [B, 3, H, W]."""

    x: torch.Tensor
    y: torch.Tensor


class Kind(NamedTuple):
    """What distinguishes steps that compute differently.

    channels: see `PartlyTrained.forward`. judged: whether the discriminator counts, and trains. want_norm: whether the
    norm of the autoencoder's gradient is computed.
    """

    channels: tuple[int, ...]
    judged: bool
    want_norm: bool


Compute = Callable[[Kind, torch.Tensor, float, float], dict[str, torch.Tensor]]  # the last arguments of update_networks


def take_step(
    state: State,
    recipe: AutoencoderRecipe,
    compute: Compute,
    pixels: torch.Tensor,
    channels: tuple[int, ...],
    want_norm: bool,
) -> Taken:
    """Takes the step after `state.step` on this rank's share of the batch, uint8 [b, H, W, 3] on the CPU."""
    step = state.step + 1
    kind = Kind(channels, CRITIC in state.networks and step > recipe.gan.gan_start, want_norm)
    lr, critic_lr = (
        learning_rate(step, lr, recipe.warmup_steps, 0.0, recipe.lr_ends) for lr in (recipe.lr, recipe.critic_lr)
    )
    losses = compute(kind, pixels, lr, critic_lr)
    if state.average is not None:
        state.average.update(state.networks[NAME].network, step)
    norm = {"grad_norm": losses.pop("grad_norm")} if want_norm else {}
    return Taken(losses, {"lr": lr} | norm)


def update_networks(
    state: State,
    objective: Objective,
    recipe: AutoencoderRecipe,
    accumulate: int,
    kind: Kind,
    pixels: torch.Tensor,
    lr: float | torch.Tensor,
    critic_lr: float | torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Updates the weights with a batch, in `accumulate` parts one after another. Returns the losses; and "grad_norm".

    The autoencoder takes its step first, then the discriminator with the same reconstructions. A CUDA graph can repeat
    this if pixels and learning rates are tensors on the device.
    """
    trained = state.networks[NAME]
    critic = state.networks[CRITIC] if kind.judged else None
    pixels = channels_first(pixels.to(next(trained.network.parameters()).device, non_blocking=True))
    parts = [part / 127.5 - 1 for part in pixels.chunk(accumulate)]
    sums, pairs = Sums(len(parts)), []
    for number, x in enumerate(parts):
        with gradients_summed(trained.called, last=number == len(parts) - 1):
            with autocast(x.device, recipe.precision):
                y = trained.called(x, kind.channels)
                made = full_precision(y.detach()).requires_grad_()
                x = torch.cat([x] * len(kind.channels)) if kind.channels else x
                losses = objective.reconstruction(made, x)
                if critic is not None:
                    losses["adversarial"] = critic.network.judge(made)
            combined, gradient = combine(trained, objective, losses, made, y)
            trained.backward(y, gradient / len(parts))
        sums.add(combined | losses)
        pairs.append(Pair(x, made.detach()))
    norm = trained.update(lr, recipe.clip_grad, kind.want_norm)
    if critic is not None:
        update_critic(critic, recipe, pairs, critic_lr, sums)
    return sums.means() | ({"grad_norm": norm} if kind.want_norm else {})


def combine(
    trained: Trained, objective: Objective, losses: dict[str, torch.Tensor], made: torch.Tensor, y: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The weighted sum of the losses, "loss", with other numbers for the log; and its gradient by `made`, scaled.

    y: the reconstructions. made: the same as a leaf, from which the losses were computed. So each loss is
    differentiated once, and the adaptive weight needs only the last layer of the decoder besides.
    """
    total, numbers, options = objective.total(losses), {}, objective.recipe.gan
    gradient = trained.gradient(total, made)
    if "adversarial" in losses:
        of_adversarial, weight = trained.gradient(losses["adversarial"], made), options.gan_weight
        if options.gan_adaptive:
            last = last_weight(trained.network)
            ratio = adaptive_weight(y, gradient, of_adversarial, last, options.gan_clamp, trained.scaler)
            ratio = ratio.nan_to_num(0.0)  # in float16, if the gradients overflow; the scaler then skips the step
            weight, numbers["adversarial_ratio"] = weight * ratio, ratio
        total, gradient = total + weight * losses["adversarial"], gradient + weight * of_adversarial
    return {"loss": total} | numbers, gradient


def last_weight(network: DCAE) -> torch.Tensor:
    """The weight of the decoder's last convolution."""
    convolutions = (module for module in network.decoder.project_out.modules() if isinstance(module, nn.Conv2d))
    return list(convolutions)[-1].weight


def update_critic(
    critic: Trained, recipe: AutoencoderRecipe, pairs: list[Pair], lr: float | torch.Tensor, sums: "Sums"
) -> None:
    """Takes the discriminator's step."""
    for number, (x, y) in enumerate(pairs):
        with gradients_summed(critic.called, last=number == len(pairs) - 1):
            with autocast(x.device, recipe.precision):
                losses = critic.called(x, y)
            loss = sum(loss for name, loss in losses.items() if name != "discriminator_accuracy")
            critic.backward(loss / len(pairs))
        sums.add(losses)
    critic.update(lr)


class Sums:
    """Sums of scalars by name over the parts of a batch."""

    def __init__(self, parts: int):
        self.parts, self.values = parts, {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value.detach()

    def means(self) -> dict[str, torch.Tensor]:
        return {name: value / self.parts for name, value in self.values.items()}
