"""Adversarial losses of autoencoder training, their adaptive weight, and regularization of the discriminator.

logits: of a discriminator, of any shape, large for real pictures. All results are scalars in float32 (in float64 for
float64 inputs).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from dcae_fast import distributed

from .losses import full_precision

KINDS = ("hinge", "non-saturating")
WEIGHT_EPS = 1e-4


def generator_loss(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """The loss of the autoencoder; logits: of its reconstructions.

        "hinge":           mean(-logits)             (arXiv 1705.02894; also in VQGAN)
        "non-saturating":  mean(softplus(-logits))   (arXiv 1406.2661)

    Raises ValueError for another kind.
    """
    _check_kind(kind)
    logits = full_precision(logits)
    return -logits.mean() if kind == "hinge" else F.softplus(-logits).mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: str) -> torch.Tensor:
    """The loss of the discriminator; the logits of pictures and of reconstructions may differ in shape.

        "hinge":           (mean(relu(1 - real)) + mean(relu(1 + fake))) / 2        (arXiv 1705.02894)
        "non-saturating":  (mean(softplus(-real)) + mean(softplus(fake))) / 2       (arXiv 1406.2661)

    The factor 1/2 is from VQGAN (arXiv 2012.09841). Raises ValueError for another kind.
    """
    _check_kind(kind)
    real, fake = full_precision(real_logits), full_precision(fake_logits)
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(KINDS)}")


def adaptive_weight(
    y: torch.Tensor,
    of_reconstruction: torch.Tensor,
    of_generator: torch.Tensor,
    last_weight: torch.Tensor,
    clamp: float = 1e4,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor:
    """The weight that makes both losses equally strong at the last layer (VQGAN, arXiv 2012.09841, equation 7).

        min(|dR/dw| / (|dG/dw| + 1e-4), clamp)

    R, G: the loss of the reconstructions y, and the loss of the generator. of_reconstruction, of_generator: their
    gradients by y, in any dtype, scaled if there is a scaler. w: last_weight, the weight of the decoder's last layer.
    The norms are L2. The result is a scalar without gradient, in float32, on the device of w. The graph of y is kept,
    and no `.grad` changes.

    Several ranks: the gradients are averaged over the ranks before their norms are taken. So the weight is the same on
    all ranks, and it is the weight of one process with the whole batch. All ranks must call this.

    scaler: of the autoencoder, in float16. Scaled gradients do not underflow; the scale cancels. If they overflow, the
    weight may be NaN, and the scaler skips the step.

    FSDP2: the forward pass uses a whole weight, not the sharded parameter. Read `layer.weight` after the forward pass:
    it is then the whole weight if the layer belongs to the root, or to another unit that does not reshard after the
    forward pass.

    Raises ValueError if w requires no gradient, if y does not depend on w, or if clamp is not positive.
    """
    if not clamp > 0:
        raise ValueError(f"clamp={clamp}; expected a positive number")
    if not last_weight.requires_grad:
        raise ValueError("last_weight requires no gradient; expected a trained weight")
    gradients = [_by_weight(y, gradient, last_weight) for gradient in (of_reconstruction, of_generator)]
    mean = distributed.all_sum(torch.stack(gradients)) / distributed.world_size()
    by_reconstruction, by_generator = torch.linalg.vector_norm(mean, dim=1)
    eps = torch.full_like(by_generator, WEIGHT_EPS)
    eps = eps if scaler is None else scaler.scale(eps)
    return (by_reconstruction / (by_generator + eps)).clamp(max=clamp)


def _by_weight(y: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient by a weight of a loss with this gradient by y; as a flat tensor, whole on each rank."""
    result = None
    if y.requires_grad:
        with torch.autograd.set_multithreading_enabled(False):  # Python functions take longer in another thread
            (result,) = torch.autograd.grad(y, weight, gradient.to(y.dtype), retain_graph=True, allow_unused=True)
    if result is None:
        sharded = isinstance(weight, DTensor)
        advice = ": it is sharded; read it after the forward pass, from a layer of FSDP's root" if sharded else ""
        raise ValueError(f"y does not depend on last_weight{advice}")
    whole = result.full_tensor() if isinstance(result, DTensor) else result
    return full_precision(whole.detach()).flatten()


def gradient_penalty(real_images: torch.Tensor, real_logits: torch.Tensor) -> torch.Tensor:
    """R1 without its factor gamma / 2 (arXiv 1801.04406): the mean over pictures of |d sum(logits) / d picture|².

    real_images: [B, C, H, W], which required a gradient when the discriminator computed real_logits [B, ...]. The
    result has a gradient by the discriminator's weights, which is a second derivative. With a batch norm in the
    discriminator, the gradient of a picture includes its effect on the logits of the others.

    Raises ValueError if real_images requires no gradient, or if real_logits does not depend on real_images.
    """
    if not real_images.requires_grad:
        raise ValueError("real_images requires no gradient; call real_images.requires_grad_() before the discriminator")
    gradient = None
    if real_logits.requires_grad:
        total = full_precision(real_logits).sum()
        (gradient,) = torch.autograd.grad(total, real_images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("real_logits does not depend on real_images")
    return full_precision(gradient).square().flatten(1).sum(1).mean()


class LeCam(nn.Module):
    """LeCam regularization of the discriminator (arXiv 2104.03310): (real_logits, fake_logits) → scalar.

        mean(relu(real - F)²) + mean(relu(R - fake)²)

    R, F: moving averages of the mean of real_logits and of fake_logits, over all ranks, including those of this call.
    As in the authors' code, the ReLU spares logits beyond the other average, and the averages have no bias towards
    their initial value 0:

        average = decay * average + (1 - decay) * mean over logits and ranks
        total = decay * total + (1 - decay)
        R = average / total

    Each call changes the averages, and all ranks must call this. Buffers: `real`, `fake`, `total`, float32 scalars; a
    training that resumes exactly saves them. decay: at least 0, less than 1; else ValueError.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}; expected at least 0 and less than 1")
        self.decay = decay
        for name in ("real", "fake", "total"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
        real, fake = full_precision(real_logits), full_precision(fake_logits)
        self._update(real.detach().mean(), fake.detach().mean())
        real_average, fake_average = self.real / self.total, self.fake / self.total
        return F.relu(real - fake_average).square().mean() + F.relu(real_average - fake).square().mean()

    @torch.no_grad()
    def _update(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        means = distributed.all_sum(torch.stack([real, fake])) / distributed.world_size()
        for average, mean in zip((self.real, self.fake, self.total), (*means, torch.ones_like(real)), strict=True):
            average.lerp_(mean.to(average), 1 - self.decay)
