"""Reconstruction of photographs by an autoencoder, and the choice of device and dtype."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import dcae_fast

from . import ops
from .errors import DeviceError
from .fast.module import is_fast
from .finite import check_finite
from .images import MAX_PIXELS, PhotographError, fit, psnr, read_photograph, to_uint8
from .models.autoencoder import DCAE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """The device and dtype to compute with.

    device: None means CUDA if available, else the CPU; under torchrun, "cuda" means the GPU of this rank. dtype: a key
    of `DTYPES`; None means bfloat16 on CUDA, else float32. Raises DeviceError if the device does not exist or cannot
    compute in this dtype.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        one = torch.ones(1, 1, 3, 3, device=device, dtype=DTYPES[dtype])
        F.conv2d(one, one).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"cannot compute in {dtype} on device {device!r}: {reason}") from error
    return torch.device(device), DTYPES[dtype]


def load_model(source: str, device: str | None, dtype: str | None) -> DCAE:
    """Loads an autoencoder, channels-last, with the device and dtype of `choose_device`.

    source: as in `DCAE.from_pretrained`. Raises DeviceError and CheckpointError.
    """
    device_and_dtype = choose_device(device, dtype)
    return DCAE.from_pretrained(source).to(*device_and_dtype, memory_format=torch.channels_last)


def load_photograph(
    path: Path, model: DCAE, how: str, max_pixels: int = MAX_PIXELS
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A photograph fitted by `images.fit`, on the model's device and in its dtype, and its original (height, width).

    Raises PhotographError if the file cannot be read, has more than `max_pixels` pixels, or is too small to crop.
    """
    x = read_photograph(path, max_pixels)
    try:
        fitted = fit(x, model.spatial_compression_ratio, how)
    except ValueError as error:
        raise PhotographError(f"{path}: {error}") from error
    weight = next(model.parameters())
    return fitted.to(weight.device, weight.dtype, memory_format=torch.channels_last), tuple(x.shape[-2:])


@dataclass(frozen=True)
class Reconstruction:
    """original, picture: uint8 [1, 3, H, W] on the CPU. seconds: time to encode and decode. psnr: in dB.

    difference: the largest absolute and the relative L2 difference between the pictures of the patched and the
    unpatched model, in the range [-1, 1]; None if the two were not compared.
    """

    original: torch.Tensor
    picture: torch.Tensor
    seconds: float
    psnr: float
    difference: tuple[float, float] | None


@torch.inference_mode()
def reconstruct(path: Path, model: DCAE, how: str, max_pixels: int = MAX_PIXELS) -> Reconstruction:
    """Encodes and decodes a photograph; also compares a patched model with the unpatched one.

    On a CPU the operators have no kernels: patching changes nothing, and nothing is compared. On a GPU the first run,
    which compiles kernels, is not timed. Raises PhotographError and NotFiniteError.
    """
    x, (height, width) = load_photograph(path, model, how, max_pixels)
    y, seconds = _timed(model, x)
    difference = None
    if any(map(is_fast, model.modules())) and ops.has_kernels(x):
        with dcae_fast.patched(model, disable="all"):
            unpatched = model(x).float()
        check_finite(unpatched, ["the reconstruction by the unpatched model"], x.dtype)
        error = y.float() - unpatched
        difference = (error.abs().max().item(), (error.norm() / unpatched.norm()).item())
    check_finite(y, ["the reconstruction"], x.dtype)
    original, picture = (to_uint8(image)[..., :height, :width].cpu() for image in (x, y))
    return Reconstruction(original, picture, seconds, psnr(picture, original).item(), difference)


def _timed(model: DCAE, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    if x.is_cuda:
        model(x)
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    y = model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return y, time.perf_counter() - start
