"""What the commands share: errors in a request, and where and how to compute."""

from dataclasses import dataclass
from typing import Literal

from dcae_fast import distributed, sample
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.models.autoencoder import DCAE
from dcae_fast.models.diffusion_zoo import DIFFUSION_MODELS
from dcae_fast.models.weights import CheckpointError
from dcae_fast.reconstruction import load_model


class UsageError(ValueError):
    """A request that cannot be met; the message is all that is shown."""


@dataclass(frozen=True)
class Compute:
    """Where and how to compute."""

    device: str | None = None
    """a PyTorch device; by default CUDA if there is any, else the CPU"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """by default bfloat16 on CUDA, else float32"""
    patch: bool = True
    """use the fast operators"""

    def load(self, model: str) -> DCAE:
        return load_model(model, self.device, self.dtype)

    def load_diffusion(self, model: str) -> DCAEDiffusion:
        try:
            return sample.load(model, self.device, self.dtype, self.patch)
        except CheckpointError as error:
            if model in DIFFUSION_MODELS:
                raise UsageError(f"{error}\n{sample.how_to_get(model)}") from error
            raise


LISTED = 20  # unreadable pictures, in the terminal


def report_problems(failed: list[tuple[str, str]], missing: dict[str, str]) -> int:
    """Prints pictures (name, reason) that failed and why networks are missing; the exit status, 1 if there are any."""
    for name, reason in failed[:LISTED]:
        distributed.print_main(f"failed: {name}: {reason}", error=True)
    if len(failed) > LISTED:
        distributed.print_main(f"... and {len(failed) - LISTED} more", error=True)
    for reason in missing.values():
        distributed.print_main(f"missing: {reason}", error=True)
    return 1 if failed or missing else 0
