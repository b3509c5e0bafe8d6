"""Autoencoders on a folder of pictures: how close reconstructions are, and the statistics of the latents."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from PIL import Image

from dcae_fast import distributed, images
from dcae_fast.data.manifest import DataError, Sums, statistics
from dcae_fast.data.pictures import collate
from dcae_fast.models.autoencoder import DCAE

from .metrics import frechet_distance
from .moments import Moments, MomentSums
from .networks import Network
from .pictures import FolderBatches, channels_first, progress

COLUMNS = ("mean", "rms", "std", "rfid", "psnr", "ssim", "lpips", "clip_iqa")  # the original's order
NETWORKS = ("ssim", "lpips", "clip_iqa", "fid")


@dataclass(frozen=True)
class Result:
    """figures: those of `COLUMNS` that could be computed; psnr: of each picture, by its number.

    mean, rms and std are of all unscaled latents; all others but rfid are means over pictures.
    """

    figures: dict[str, float]
    psnr: dict[int, float]


@dataclass
class Measured:
    """One model's results on a rank: per picture, by its number, and sums."""

    scores: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    latents: dict[int, Sums] = field(default_factory=dict)
    moments: MomentSums = field(default_factory=MomentSums)

    def add(self, name: str, indices: list[int], values: torch.Tensor) -> None:
        self.scores[name].update(zip(indices, values.double().tolist(), strict=True))

    def gather(self) -> None:
        """Takes the other ranks' pictures too."""
        parts = distributed.all_gather((dict(self.scores), self.latents))
        names = [name for name in COLUMNS if any(name in scores for scores, _ in parts)]
        self.scores = {name: _merged([scores.get(name, {}) for scores, _ in parts]) for name in names}
        self.latents = _merged([latents for _, latents in parts])


def _merged(parts: list[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def evaluate(
    batches: FolderBatches, models: dict[str, DCAE], networks: dict[str, Network], reference: Moments | None
) -> dict[str, Result]:
    """Each model's result on all ranks' pictures, by its name.

    networks: those of `NETWORKS` that there are; reference: for rFID, or the pictures' own statistics if None.
    Of a single picture there is no rFID. Raises DataError where none can be read.
    """
    measured, originals = {name: Measured() for name in models}, MomentSums()
    for crops in progress(batches):
        for number, (name, model) in enumerate(models.items()):
            x, y, z = reconstruct(model, crops.pixels)
            _measure(measured[name], crops.indices, networks, x, y, z)
            if number == 0 and "fid" in networks and reference is None:
                originals.add(networks["fid"](x))
    for each in measured.values():
        each.gather()
    pictures = len(next(iter(measured.values())).latents)
    if not pictures:
        raise DataError("no picture could be read")
    if "fid" not in networks or pictures < 2:
        reference = None
    elif reference is None:
        reference = originals.moments()
    return {name: _result(each, reference) for name, each in measured.items()}


def _measure(
    measured: Measured,
    indices: list[int],
    networks: dict[str, Network],
    x: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
) -> None:
    """Adds a batch: pictures x, reconstructions y and latents z."""
    measured.latents |= {i: Sums.of(each.numpy()) for i, each in zip(indices, z.float().cpu(), strict=True)}
    measured.add("psnr", indices, images.psnr(y, x))
    for name in ("ssim", "lpips"):
        if name in networks:
            measured.add(name, indices, networks[name](y, x))
    if "clip_iqa" in networks:
        measured.add("clip_iqa", indices, networks["clip_iqa"](y))
    if "fid" in networks:
        measured.moments.add(networks["fid"](y))


def _result(measured: Measured, reference: Moments | None) -> Result:
    figures = statistics(measured.latents.values())
    figures |= {name: math.fsum(each.values()) / len(each) for name, each in measured.scores.items()}
    if reference is not None:
        figures["rfid"] = frechet_distance(measured.moments.moments(), reference)
    return Result({name: figures[name] for name in COLUMNS if name in figures}, measured.scores["psnr"])


@torch.inference_mode()
def reconstruct(model: DCAE, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 [n, H, W, 3] → picture and reconstruction, uint8 [n, 3, H, W], and the latents, on the model's device.

    The picture is what is left of it in the dtype of the model, as in the original.
    """
    weight = next(model.parameters())
    x = channels_first(pixels.to(weight.device, non_blocking=True)).float().div_(255).mul_(2).sub_(1).to(weight.dtype)
    z = model.encode(x)
    return images.to_uint8(x), images.to_uint8(model.decode(z)), z


def examples(batches: FolderBatches, models: dict[str, DCAE], psnr: dict[int, float]) -> Image.Image:
    """The pictures of the best, the median and the worst PSNR, a row each, beside each model's reconstruction."""
    order = sorted(psnr, key=lambda index: (-psnr[index], index))
    rows = []
    for what, index in zip(("best", "median", "worst"), (order[0], order[len(order) // 2], order[-1]), strict=True):
        pixels = collate([batches.crops([index])[0]]).pixels
        row = []
        for name, model in models.items():
            x, y, _ = reconstruct(model, pixels)
            if not row:
                row.append((images.to_image(x), "original"))
            row.append((images.to_image(y), f"{name}, PSNR {images.psnr(y, x).item():.2f} dB"))
        rows.append(images.side_by_side(row, f"{what}: {batches.pictures.items[index].name}"))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:number])))
    return sheet
