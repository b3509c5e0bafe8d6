"""dcae_fast makes DC-AE autoencoders and the diffusion transformers on their latents fast.

import dcae_fast
dcae_fast.patch(model)

PyTorch is imported when one of the public names is first used, so that `dcae-fast --help` answers at once.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fast.patch import ErrorBudget, Report, patch, patched, register_root, unpatch

try:
    __version__ = version("dcae_fast")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["ErrorBudget", "Report", "__version__", "patch", "patched", "register_root", "unpatch"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .fast import patch

    globals().update({public: getattr(patch, public) for public in __all__ if public != "__version__"})
    return globals()[name]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
