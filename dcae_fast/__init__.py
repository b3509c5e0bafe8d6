"""dcae_fast: DC-AE and the diffusion transformers in its latent space, as fast as the hardware allows.

import dcae_fast
dcae_fast.patch(model)
"""

from importlib.metadata import PackageNotFoundError, version

from .fast.patch import Report, patch, patched, unpatch

try:
    __version__ = version("dcae_fast")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["Report", "__version__", "patch", "patched", "unpatch"]
