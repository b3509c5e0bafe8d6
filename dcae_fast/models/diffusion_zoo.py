"""The released diffusion models: name → network, autoencoder, and how it is trained and sampled.

All make pictures of 512 pixels and 1000 classes. Schedulers and samplers have the names of the original (DC-Gen).
"""

from dataclasses import dataclass

from . import zoo
from .dit import DiT, DiTConfig
from .uvit import UViT, UViTConfig

RESOLUTION = 512


@dataclass(frozen=True)
class DiffusionConfig:
    """network: configuration of the network; autoencoder: the name, in `zoo`, of the one whose latents it models.

    train_scheduler: "DPM_Solver", "GaussianDiffusion" (noise prediction) or "SiTSampler" (flow). eval_scheduler: the
    sampler it was released with, "DPM_Solver", "GaussianDiffusion" or "ODE_dopri5", and its num_inference_steps.
    """

    network: UViTConfig | DiTConfig
    autoencoder: str
    train_scheduler: str
    eval_scheduler: str
    num_inference_steps: int

    @property
    def scaling_factor(self) -> float:
        """What the autoencoder's latents are multiplied by before the network sees them."""
        return zoo.AUTOENCODERS[self.autoencoder].scaling_factor

    def build(self) -> UViT | DiT:
        """The network with random weights."""
        return UViT(self.network) if isinstance(self.network, UViTConfig) else DiT(self.network)


SIZES = {
    "s": {"depth": 12, "hidden_size": 512, "num_heads": 8},
    "h": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "xl": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "2b": {"depth": 28, "hidden_size": 2048, "num_heads": 32},
    "3b": {"depth": 56, "hidden_size": 2048, "num_heads": 32},
}
DPM_SOLVER = {"train_scheduler": "DPM_Solver", "eval_scheduler": "DPM_Solver", "num_inference_steps": 30}
GAUSSIAN = {"train_scheduler": "GaussianDiffusion", "eval_scheduler": "GaussianDiffusion", "num_inference_steps": 250}
FLOW = {"train_scheduler": "SiTSampler", "eval_scheduler": "ODE_dopri5", "num_inference_steps": 250}


def _latents(autoencoder: str) -> dict[str, int]:
    config = zoo.AUTOENCODERS[autoencoder]
    ratio = 2 ** (len(config.encoder.depth) - 1)
    return {"in_channels": config.latent_channels, "input_size": RESOLUTION // ratio}


def _uvit(autoencoder: str, size: str) -> DiffusionConfig:
    return DiffusionConfig(UViTConfig(**SIZES[size], **_latents(autoencoder)), autoencoder, **DPM_SOLVER)


def _usit(autoencoder: str, size: str) -> DiffusionConfig:
    adaptive = zoo.AUTOENCODERS[autoencoder].adaptive
    network = UViTConfig(**SIZES[size], **_latents(autoencoder), adaptive=adaptive)
    return DiffusionConfig(network, autoencoder, **FLOW)


def _dit(autoencoder: str, size: str) -> DiffusionConfig:
    return DiffusionConfig(DiTConfig(**SIZES[size], **_latents(autoencoder)), autoencoder, **GAUSSIAN)


def _sit(autoencoder: str, size: str) -> DiffusionConfig:
    return DiffusionConfig(DiTConfig(**SIZES[size], **_latents(autoencoder), learn_sigma=False), autoencoder, **FLOW)


DIFFUSION_MODELS = {
    "dc-ae-f32c32-in-1.0-dit-xl-in-512px": _dit("dc-ae-f32c32-in-1.0", "xl"),
    "dc-ae-f32c32-in-1.0-dit-xl-in-512px-trainbs1024": _dit("dc-ae-f32c32-in-1.0", "xl"),
    "dc-ae-f32c32-in-1.0-uvit-s-in-512px": _uvit("dc-ae-f32c32-in-1.0", "s"),
    "dc-ae-f32c32-in-1.0-uvit-h-in-512px": _uvit("dc-ae-f32c32-in-1.0", "h"),
    "dc-ae-f32c32-in-1.0-uvit-2b-in-512px": _uvit("dc-ae-f32c32-in-1.0", "2b"),
    "dc-ae-f32c32-in-1.0-usit-h-in-512px": _usit("dc-ae-f32c32-in-1.0", "h"),
    "dc-ae-f32c32-in-1.0-usit-2b-in-512px": _usit("dc-ae-f32c32-in-1.0", "2b"),
    "dc-ae-f64c128-in-1.0-uvit-h-in-512px": _uvit("dc-ae-f64c128-in-1.0", "h"),
    "dc-ae-f64c128-in-1.0-uvit-h-in-512px-train2000k": _uvit("dc-ae-f64c128-in-1.0", "h"),
    "dc-ae-f64c128-in-1.0-uvit-2b-in-512px": _uvit("dc-ae-f64c128-in-1.0", "2b"),
    "dc-ae-f64c128-in-1.0-uvit-2b-in-512px-train2000k": _uvit("dc-ae-f64c128-in-1.0", "2b"),
    "dc-ae-f32c32-in-1.0-sit-xl-in-512px": _sit("dc-ae-f32c32-in-1.0", "xl"),
    "dc-ae-f64c128-1.5-usit-2b-in-512px": _usit("dc-ae-f64c128-1.5", "2b"),
    "dc-ae-f64c128-1.5-usit-3b-in-512px": _usit("dc-ae-f64c128-1.5", "3b"),
}


def diffusion_config(name: str) -> DiffusionConfig:
    """The entry of a diffusion model of the zoo; ValueError with the known names for any other."""
    if name not in DIFFUSION_MODELS:
        raise ValueError(zoo.unknown_name("diffusion model", name, list(DIFFUSION_MODELS)))
    return DIFFUSION_MODELS[name]
