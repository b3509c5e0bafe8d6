"""Losses between reconstructions and pictures, both [B, 3, H, W] in [-1, 1]: pixel losses and LPIPS."""

import importlib.util
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dcae_fast import distributed
from dcae_fast.models import functional
from dcae_fast.training.engine.config import TrainingError

CHARBONNIER_EPS = 1e-3
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # the mean and deviation of ImageNet, for [-1, 1]
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; a pool between stages
VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's VGG16_Weights.IMAGENET1K_V1
VGG16_HASH = "397923af"  # the first digits of the file's SHA-256
HEADS = (("torchmetrics", "functional/image/lpips_models/vgg.pth"), ("lpips", "weights/v0.1/vgg.pth"))
SMALLEST = 2 ** (len(VGG16) - 1)  # side of the pictures of LPIPS, in pixels

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """x in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _difference(reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    check_shapes(reconstruction, target)
    return full_precision(reconstruction) - full_precision(target)


def check_shapes(reconstruction: torch.Tensor, target: torch.Tensor) -> None:
    if reconstruction.shape != target.shape:
        shapes = f"{list(reconstruction.shape)}; target has shape {list(target.shape)}"
        raise ValueError(f"reconstruction has shape {shapes}; expected equal shapes")


def l1(reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean |d|, d = reconstruction - target"""
    return _difference(reconstruction, target).abs().mean()


def l2(reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean d², d = reconstruction - target"""
    return _difference(reconstruction, target).square().mean()


def charbonnier(reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """mean sqrt(d² + eps²), d = reconstruction - target, eps = 1e-3.

    Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed imaging", ICIP 1994;
    eps as in LapSRN, arXiv 1704.03915.
    """
    return (_difference(reconstruction, target).square() + CHARBONNIER_EPS**2).sqrt().mean()


PIXEL_LOSSES: dict[str, Loss] = {"l1": l1, "l2": l2, "charbonnier": charbonnier}


def pixel_loss(kind: str) -> Loss:
    """The function of `PIXEL_LOSSES` with this name: (reconstruction, target) → scalar.

    The scalar is the mean over all elements, computed in float32 for inputs of any precision. Raises ValueError if
    there is no such loss; the function raises ValueError if the shapes differ.
    """
    if kind not in PIXEL_LOSSES:
        raise ValueError(f"kind={kind!r}; expected one of {', '.join(PIXEL_LOSSES)}")
    return PIXEL_LOSSES[kind]


class LPIPS(nn.Module):
    """LPIPS with VGG16 (arXiv 1801.03924), with random weights: (reconstruction, target) → scalar.

        mean over b of sum over stages s of mean over pixels of sum over c of heads[s][c] (a_c - b_c)²

    a, b: features of reconstruction and target after the last ReLU of a stage, [B, C, h, w], normalised as in
    `functional.feature_distance`.

    Inputs: [B, 3, H, W] in [-1, 1], at least 16 pixels high and wide. The gradient flows to the reconstruction only;
    the parameters are frozen. Under autocast, convolutions run in its precision. The distance is in float32.

    Names: `features.N` as in torchvision's VGG16, heads.s: [C].
    """

    def __init__(self):
        super().__init__()
        layers, channels, self.ends = [], 3, []
        for stage in VGG16:
            if self.ends:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.full((stage[-1],), 1 / stage[-1]) for stage in VGG16)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The features of pictures after the last ReLU of each stage."""
        x, stages = (x - self.shift) / self.scale, []
        for number, layer in enumerate(self.features, 1):
            x = layer(x)
            if number in self.ends:
                stages.append(x)
        return stages

    def forward(self, reconstruction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        check_shapes(reconstruction, target)
        if reconstruction.ndim != 4 or reconstruction.shape[1] != 3:
            raise ValueError(f"reconstruction has shape {list(reconstruction.shape)}; expected [B, 3, H, W]")
        with torch.no_grad():
            wanted = self.stages(target)
        stages = zip(self.stages(reconstruction), wanted, self.heads, strict=True)
        return torch.stack([self.distance(*stage) for stage in stages]).sum()

    distance = staticmethod(functional.feature_distance)


def perceptual_loss(device: torch.device) -> LPIPS:
    """LPIPS with its published weights, on a device, in channels-last format. Called by all ranks.

    The weights of VGG16 are torchvision's file, which is downloaded if it is not in the folder of torch.hub. The heads
    are a file in the package torchmetrics or lpips; neither package is imported. Raises TrainingError if weights are
    missing or invalid; the message says which file goes where.
    """
    heads_file, vgg16_file = _heads_file(), Path(torch.hub.get_dir()) / "checkpoints" / VGG16_URL.rpartition("/")[2]
    distributed.on_main(lambda: _download(vgg16_file))  # before the others, which then find the file
    _download(vgg16_file)
    weights = {name: tensor for name, tensor in _read(vgg16_file).items() if name.startswith("features.")}
    heads = _read(heads_file)
    weights |= {f"heads.{name[3]}": tensor.flatten() for name, tensor in heads.items()}  # from lin0.model.1.weight
    loss = LPIPS()
    try:
        loss.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise TrainingError(f"{vgg16_file} or {heads_file} has other tensors than LPIPS: {reason}") from error
    return loss.to(device, memory_format=torch.channels_last)


def _heads_file() -> Path:
    for package, file in HEADS:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            if (Path(folder) / file).is_file():
                return Path(folder) / file
    package, file = HEADS[0]
    raise TrainingError(
        f"the heads of LPIPS are missing: they are the file {file} of the package {package}\n"
        f"  pip install {package}\n  or pass --perceptual none"
    )


def _download(file: Path) -> None:
    """Downloads the weights of VGG16, unless the file exists."""
    if file.exists():
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG16_URL, str(file), VGG16_HASH, progress=distributed.is_main())
    except (OSError, RuntimeError) as error:  # OSError includes URLError; RuntimeError: another hash
        raise TrainingError(
            f"cannot download the VGG16 weights of LPIPS: {error}\n  download {VGG16_URL}\n  into {file.parent}\n"
            "  or pass --perceptual none"
        ) from error


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TrainingError(
            f"cannot read the weights of LPIPS from {file}: {reason}\n  replace the file, or pass --perceptual none"
        ) from error
