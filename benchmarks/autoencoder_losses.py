"""The losses of a training step of an autoencoder: L1, or L1 with LPIPS and a discriminator.

LPIPS has random weights. The adversarial loss has a constant weight: the adaptive weight would run a second backward
pass of the whole decoder under torch.compile.
"""

import torch
import torch.nn.functional as F
from torch import nn

import dcae_fast
from dcae_fast.training.autoencoder.config import Adversarial
from dcae_fast.training.autoencoder.critic import Critic
from dcae_fast.training.autoencoder.losses import LPIPS
from dcae_fast.training.engine.optimizer import build_optimizer
from dcae_fast.training.engine.parallel import apply_compile
from dcae_fast.training.engine.state import Trained

PERCEPTUAL, ADVERSARIAL = 0.25, 0.1  # weights


class Losses:
    """The loss of reconstructions, and the step of the discriminator if there is one."""

    def __init__(self, adversarial: bool, device: torch.device):
        self.critic: Critic | None = None
        if adversarial:
            torch.manual_seed(2)
            with torch.device(device):
                self.perceptual, self.critic = random_lpips(), Critic(Adversarial(gan_weight=ADVERSARIAL))
            if device.type == "cuda":
                for module in (self.perceptual, self.critic):
                    module.to(memory_format=torch.channels_last)

    def patch(self) -> None:
        if self.critic is not None:
            dcae_fast.patch(self.perceptual)

    def compile(self, mode: str | None) -> None:
        if self.critic is not None:
            apply_compile([self.perceptual, self.critic.discriminator], mode)

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The loss of reconstructions y of images x."""
        loss = F.l1_loss(y, x)
        if self.critic is None:
            return loss
        return loss + PERCEPTUAL * self.perceptual(y, x) + ADVERSARIAL * self.critic.judge(y)

    def of_critic(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The loss of the discriminator for the same reconstructions."""
        return self.critic(x, y.detach())["discriminator"]


def random_lpips() -> LPIPS:
    """LPIPS whose features have the same size in all layers."""
    perceptual = LPIPS()
    for module in perceptual.features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return perceptual


def with_optimizer(model: nn.Module, lr: float, capturable: bool) -> Trained:
    """The model in training, with fused AdamW."""
    optimizer = build_optimizer(model, lr, betas=(0.9, 0.999), weight_decay=0.1)
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        group["capturable"] = capturable and device.type == "cuda"
    return Trained(model, model, optimizer, torch.amp.GradScaler(device.type, enabled=False))
