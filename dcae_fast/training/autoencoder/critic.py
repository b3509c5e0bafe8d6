"""The discriminator in training, with its loss."""

import torch
from torch import nn

from .adversarial import LeCam, discriminator_loss, generator_loss, gradient_penalty
from .config import Adversarial
from .discriminator import PatchDiscriminator


class Critic(nn.Module):
    """A discriminator and the averages that its regularisation needs: all that a checkpoint keeps of it.

    One call computes the whole loss of a batch, so that DDP can wrap the critic.
    """

    def __init__(self, options: Adversarial):
        super().__init__()
        self.options = options
        self.discriminator = PatchDiscriminator(
            options.discriminator_layers, options.discriminator_width, options.discriminator_norm
        )
        self.lecam = LeCam(options.lecam_decay) if options.lecam else None

    def judge(self, fake: torch.Tensor) -> torch.Tensor:
        """The adversarial loss of reconstructions [B, 3, H, W]; the discriminator itself gets no gradient."""
        self.discriminator.requires_grad_(False)
        try:
            return generator_loss(self.discriminator(fake), self.options.gan_loss)
        finally:
            self.discriminator.requires_grad_(True)

    def forward(self, real: torch.Tensor, fake: torch.Tensor) -> dict[str, torch.Tensor]:
        """The losses of the discriminator, by name, weighted, for pictures and reconstructions [B, 3, H, W].

        "discriminator_accuracy" is not a loss: the fraction of logits that have the right sign. Near 1, or near 1/2 for
        long, the discriminator teaches nothing.
        """
        if self.options.r1:
            real = real.detach().requires_grad_()
        of_real, of_fake = self.discriminator(real), self.discriminator(fake)
        losses = {"discriminator": discriminator_loss(of_real, of_fake, self.options.gan_loss)}
        if self.options.r1:
            losses["r1"] = self.options.r1 * gradient_penalty(real, of_real)
        if self.lecam is not None:
            losses["lecam"] = self.options.lecam * self.lecam(of_real, of_fake)
        right = ((of_real > 0).float().mean() + (of_fake < 0).float().mean()) / 2
        return losses | {"discriminator_accuracy": right.detach()}
