"""DC-AE and the diffusion transformers in its latent space, in plain PyTorch. Fast code is tested against them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import CoderConfig, DCAEConfig, DiTConfig, UViTConfig

if TYPE_CHECKING:
    from .autoencoder import DCAE
    from .dit import DiT
    from .uvit import UViT

__all__ = ["CoderConfig", "DCAE", "DCAEConfig", "DiT", "DiTConfig", "UViT", "UViTConfig"]
NETWORKS = {"DCAE": ".autoencoder", "DiT": ".dit", "UViT": ".uvit"}  # imported on first use, since they import PyTorch


def __getattr__(name: str) -> Any:
    if name not in NETWORKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(NETWORKS[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *NETWORKS]
