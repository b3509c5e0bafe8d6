"""DC-AE in plain PyTorch: readable, and the oracle of everything faster."""

from .autoencoder import DCAE, CoderConfig, DCAEConfig

__all__ = ["CoderConfig", "DCAE", "DCAEConfig"]
