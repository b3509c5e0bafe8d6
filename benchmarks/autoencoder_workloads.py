"""The workloads of training an autoencoder: model, recipe, batch, image size and contenders; and of its loss."""

from dataclasses import dataclass, replace

import torch

from dcae_fast.models.config import CoderConfig, DCAEConfig
from dcae_fast.models.zoo import autoencoder_config

from .workloads import F32, F64, SANA

# What each recipe trains: beginnings of parameter names. All other parameters are frozen.
RECIPES = {
    "full": ("encoder", "decoder"),
    "latent-adaptation": ("encoder.project_out", "decoder.project_in"),
    "decoder": ("decoder",),
}
UNCOMPILED = ("eager", "eager channels-last", "patched channels-last", "patched + CUDA graphs")
ALL = (
    *UNCOMPILED[:2], "torch.compile", "torch.compile, reduce-overhead", UNCOMPILED[2], "patched + torch.compile",
    UNCOMPILED[3],
)  # fmt: skip
LOSS_CONTENDERS = ("eager", "patched", "eager, other seed")


@dataclass(frozen=True)
class TrainingWorkload:
    """A training step on `batch` images of size × size pixels.

    recipe: one of `RECIPES`. adversarial: with LPIPS, and with a discriminator that takes a step too.
    """

    model: str
    recipe: str
    batch: int
    size: int
    contenders: tuple[str, ...] = ALL
    adversarial: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.recipe}-b{self.batch}-{self.size}{'-adversarial' if self.adversarial else ''}"


TRAINING_WORKLOADS = [
    TrainingWorkload(F32, "full", 16, 256),
    TrainingWorkload(SANA, "full", 16, 256),
    TrainingWorkload(F64, "full", 16, 256),
    TrainingWorkload(F32, "full", 4, 512),
    TrainingWorkload(SANA, "full", 4, 512),
    TrainingWorkload(F32, "latent-adaptation", 4, 1024),
    TrainingWorkload(F32, "decoder", 8, 512),
    TrainingWorkload(F32, "full", 16, 256, adversarial=True),
]
TRAINING_REHEARSAL = [TrainingWorkload("dc-ae-tiny", recipe, 2, 32, UNCOMPILED) for recipe in RECIPES]


def training_workloads() -> list[TrainingWorkload]:
    """The workloads; small ones on a machine without a GPU."""
    return TRAINING_WORKLOADS if torch.cuda.is_available() else TRAINING_REHEARSAL


@dataclass(frozen=True)
class LossWorkload:
    """Training on `batch` crops of size × size pixels. narrower: divides all widths of the model."""

    model: str
    narrower: int
    batch: int
    size: int
    contenders: tuple[str, ...] = LOSS_CONTENDERS

    @property
    def name(self) -> str:
        return f"{self.model}-width-{self.narrower}th-loss-b{self.batch}-{self.size}"

    def config(self) -> DCAEConfig:
        def narrow(coder: CoderConfig) -> CoderConfig:
            return replace(coder, width=tuple(width // self.narrower for width in coder.width))

        whole = autoencoder_config(self.model)
        return replace(whole, encoder=narrow(whole.encoder), decoder=narrow(whole.decoder), name=None)


LOSS_WORKLOADS = [LossWorkload(F32, 4, 16, 256)]
LOSS_REHEARSAL = [LossWorkload("dc-ae-tiny", 1, 2, 32)]


def loss_workloads() -> list[LossWorkload]:
    """The workloads; small ones on a machine without a GPU."""
    return LOSS_WORKLOADS if torch.cuda.is_available() else LOSS_REHEARSAL
