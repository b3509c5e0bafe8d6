"""The families of models that `patch` knows; each file registers its classes when it is imported."""

from . import autoencoder_dc, dcae, lpips, sana, sana_original, uvit_dit

__all__ = ["autoencoder_dc", "dcae", "lpips", "sana", "sana_original", "uvit_dit"]
