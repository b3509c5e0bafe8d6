"""Class labels to pictures for the command `sample`: sampling, decoding, and saving the latents."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from .diffusion import DCAEDiffusion
from .files import written_atomically
from .finite import check_finite
from .images import to_uint8
from .reconstruction import choose_device

DEMO_LABELS = (
    279,
    333,
    979,
    936,
    933,
    145,
    497,
    1,
    248,
    360,
    793,
    12,
    387,
    437,
    938,
    978,
)  # ImageNet classes of DC-Gen's demonstration
DECODE_BATCH = 8


@dataclass(frozen=True)
class Request:
    """labels: the class of each picture. cfg: guidance scale. seed: of the noise. sampler, steps: name and step count.

    As in DC-Gen, the noise of all pictures is drawn at once: a picture depends on its label and its position.
    """

    labels: tuple[int, ...]
    cfg: float
    seed: int
    sampler: str
    steps: int

    @property
    def columns(self) -> int:
        """Columns of the grid of pictures, ⌊√n⌋ for n pictures."""
        return math.isqrt(len(self.labels))

    def __str__(self) -> str:
        rows = [self.labels[i : i + self.columns] for i in range(0, len(self.labels), self.columns)]
        return "Classes, row by row: " + "; ".join(" ".join(map(str, row)) for row in rows)


def default_labels(classes: int) -> tuple[int, ...]:
    """Sixteen labels: for 1000 classes (ImageNet) the labels of DC-Gen's demonstration, else 0, 1, 2, ..."""
    return DEMO_LABELS if classes == 1000 else tuple(i % classes for i in range(16))


def load(source: str, device: str | None, dtype: str | None) -> DCAEDiffusion:
    """Loads a diffusion model on a device.

    The transformer keeps float32 weights, for autocast. source: as in `DCAEDiffusion.from_pretrained`; device, dtype:
    as in `choose_device`. Raises DeviceError and CheckpointError.
    """
    chosen_device, chosen_dtype = choose_device(device, dtype)
    model = DCAEDiffusion.from_pretrained(source)
    model.diffusion_model.to(chosen_device)
    model.autoencoder.to(chosen_device, chosen_dtype, memory_format=torch.channels_last)
    return model


def sample(model: DCAEDiffusion, request: Request) -> torch.Tensor:
    """`generate` with a progress bar."""
    calls = {"ODE_heun2": 2 * (request.steps - 1), "ODE_dopri5": None}.get(request.sampler, request.steps)
    with tqdm(total=calls, desc=request.sampler, unit="call", disable=None) as bar:
        return generate(model, request, bar.update)


def generate(model: DCAEDiffusion, request: Request, progress: Callable[[], object] | None = None) -> torch.Tensor:
    """Samples latents [B, C, h, w]. progress: called after each call of the network.

    The transformer runs under autocast in the dtype of the autoencoder, as in DC-Gen's evaluation. Raises
    NotFiniteError and the errors of `DCAEDiffusion.generate`.
    """
    weight = next(model.autoencoder.parameters())
    with torch.autocast(weight.device.type, weight.dtype, enabled=weight.dtype != torch.float32):
        latents = model.generate(
            torch.tensor(request.labels, device=weight.device),
            cfg_scale=request.cfg,
            generator=torch.Generator(weight.device).manual_seed(request.seed),
            sampler=request.sampler,
            steps=request.steps,
            progress=progress,
        )
    check_finite(latents, [f"latent {i} (class {label})" for i, label in enumerate(request.labels, 1)], weight.dtype)
    return latents


@torch.inference_mode()
def decode(model: DCAEDiffusion, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents, `DECODE_BATCH` at a time, to pictures uint8 [B, 3, H, W] on the CPU. Raises NotFiniteError."""
    pictures = []
    for part in latents.split(DECODE_BATCH):
        y = model.decode(part)
        first = len(pictures) * DECODE_BATCH + 1
        check_finite(y, [f"picture {first + i}" for i in range(len(y))], y.dtype)
        pictures.append(to_uint8(y).cpu())
    return torch.cat(pictures)


def save_latents(latents: torch.Tensor, request: Request, model: str, path: Path) -> None:
    """Writes "latents", scaled as `generate` returns them, and "labels" atomically to a safetensors file."""
    tensors = {"latents": latents.contiguous().cpu(), "labels": torch.tensor(request.labels)}
    metadata = {name: str(value) for name, value in asdict(request).items() if name != "labels"}
    with written_atomically(path) as temporary:
        save_file(tensors, temporary, {"model": model, "scaled": "true", **metadata})
