"""DC-AE and the diffusion transformers in its latent space, in plain PyTorch: the oracle of everything faster."""

from .autoencoder import DCAE, CoderConfig, DCAEConfig
from .dit import DiT, DiTConfig
from .uvit import UViT, UViTConfig

__all__ = ["CoderConfig", "DCAE", "DCAEConfig", "DiT", "DiTConfig", "UViT", "UViTConfig"]
