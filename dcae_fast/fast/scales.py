"""Files of a calibration: safetensors with the scales of each layer, the report, and a hash of the weights."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dcae_fast.errors import CheckpointError
from dcae_fast.files import check_regular, written_atomically

from .calibration import LEAST_SCALE, CalibratedLayer, Calibration, Quality

SUFFIX = ".safetensors"
MOST_SCALE = torch.finfo(torch.float32).max / 127  # as of the largest input
KEY = "dcae_fast.calibration.channels"  # in the file's metadata
FORMER_KEY = "dcae_fast.calibration"  # of files with one scale for each layer


def hash_of(autoencoder: nn.Module) -> str:
    """SHA-256 of names, shapes and values of all weights, rounded to bfloat16: the same before and after `to`."""
    digest = hashlib.sha256()
    for name, value in sorted(autoencoder.state_dict().items()):
        if value.is_floating_point():
            digest.update(f"{name} {list(value.shape)}\n".encode())
            digest.update(value.detach().bfloat16().flatten().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_of_scales(calibration: Calibration) -> str:
    """SHA-256 of the names and scales of the layers that compute in 8 bit."""
    scales = {name: layer.scales for name, layer in calibration.layers.items() if layer.in_int8}
    return hashlib.sha256(json.dumps(scales, sort_keys=True).encode()).hexdigest()


def save(calibration: Calibration, path: str | Path) -> None:
    """Write a calibration. Raises `files.WriteError`, and ValueError unless the name ends in .safetensors."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: expected a file name that ends in {SUFFIX}")
    content = asdict(calibration)
    scales = {name: torch.tensor(layer.pop("scales"), dtype=torch.float32) for name, layer in content["layers"].items()}
    with written_atomically(path) as temporary:
        save_file(scales, temporary, {KEY: json.dumps(content)})


def load(path: str | Path, autoencoder: nn.Module) -> Calibration:
    """Read a calibration. Raises CheckpointError if the file is not readable, does not fit the layers, or was made for
    other weights.
    """
    try:
        check_regular(Path(path))
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if FORMER_KEY in metadata:
                raise ValueError("it has one scale for each layer; scales of channels are more exact: calibrate again")
            if KEY not in metadata:
                raise ValueError("expected a file that `save_scales` or `dcae-fast calibrate` wrote")
            content = json.loads(metadata[KEY])
            layers = {
                name: CalibratedLayer(scales=tuple(file.get_tensor(name).tolist()), **layer)
                for name, layer in content.pop("layers").items()
            }
        qualities = {name: Quality(**content.pop(name)) for name in ("decoding", "encoding")}
        calibration = Calibration(layers=layers, **qualities, **content)
        _check(calibration)
    except Exception as error:  # a broken or hostile file may raise anything
        is_plain = isinstance(error, (OSError, SafetensorError, ValueError))
        reason = getattr(error, "strerror", None) or (error if is_plain else repr(error))
        raise CheckpointError(f"{path}: cannot be read as scales of 8-bit layers: {reason}") from error
    check_weights(calibration, autoencoder, path)
    modules = dict(autoencoder.named_modules())
    for name, layer in calibration.layers.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.dim() < 2 or len(layer.scales) != weight.shape[1]:
            raise CheckpointError(f"{path}: {len(layer.scales)} scales for {name}; expected one for each input channel")
    return calibration


def _check(calibration: Calibration) -> None:
    """Raises ValueError for values that a calibration does not write, with which `str` or a call would fail."""
    layers, qualities = calibration.layers.values(), (calibration.decoding, calibration.encoding)
    numbers = [value for quality in qualities for value in vars(quality).values()]
    numbers += [value for layer in layers for value in (layer.psnr, layer.share)]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers):
        raise ValueError("a figure is not a number")
    if not all(LEAST_SCALE <= scale <= MOST_SCALE for layer in layers for scale in layer.scales):
        raise ValueError("a scale is not a positive number in float32")
    if not all(isinstance(layer.in_int8, bool) for layer in layers) or type(calibration.pictures) is not int:
        raise ValueError("in_int8 is neither true nor false, or pictures is not an integer")


def check_weights(calibration: Calibration, autoencoder: nn.Module, name: str | Path = "calibration") -> None:
    """Raises CheckpointError if the calibration was made for other weights. name: of the calibration or its file."""
    if calibration.weights != hash_of(autoencoder):
        raise CheckpointError(
            f"{name}: the scales were calibrated for other weights, or for the same weights with other names, such as"
            " those in another library; calibrate this model"
        )
