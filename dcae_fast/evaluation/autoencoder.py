"""Evaluation of autoencoders on a folder of pictures: reconstruction quality, and statistics of the latents."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image

from dcae_fast import distributed, images
from dcae_fast.data.manifest import Sums, statistics
from dcae_fast.data.pictures import Crops, collate
from dcae_fast.errors import DataError
from dcae_fast.finite import finite_rows, not_finite_message
from dcae_fast.models.autoencoder import DCAE

from .metrics import frechet_distance
from .moments import Moments, MomentSums
from .networks import Network
from .pictures import FolderBatches, channels_first, progress

LATENT_ERROR = "latent_error"
COLUMNS = ("mean", "rms", "std", "rfid", "psnr", "ssim", "lpips", "clip_iqa")  # DC-Gen's order
NETWORKS = ("ssim", "lpips", "clip_iqa", "fid")


@dataclass(frozen=True)
class Result:
    """figures: the values of `COLUMNS` that could be computed. psnr: of each picture, by picture number.

    mean, rms and std are over all unscaled latents; rfid is over all pictures; the others are means over pictures.
    Where an exact model is named, the others also have `LATENT_ERROR`: the relative L2 error of their latents.
    """

    figures: dict[str, float]
    psnr: dict[int, float]


@dataclass
class Measured:
    """The results of one model on one rank: scores and latent sums by picture number, and sums of features."""

    scores: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    latents: dict[int, Sums] = field(default_factory=dict)
    moments: MomentSums = field(default_factory=MomentSums)

    def add(self, name: str, indices: list[int], values: torch.Tensor) -> None:
        self.scores[name].update(zip(indices, values.double().tolist(), strict=True))

    def gather(self) -> None:
        """Adds the scores and latent sums of the other ranks."""
        parts = distributed.all_gather((dict(self.scores), self.latents))
        names = [name for name in (*COLUMNS, LATENT_ERROR) if any(name in scores for scores, _ in parts)]
        self.scores = {name: _merged([scores.get(name, {}) for scores, _ in parts]) for name in names}
        self.latents = _merged([latents for _, latents in parts])


def _merged(parts: list[dict]) -> dict:
    return {key: value for part in parts for key, value in part.items()}


def evaluate(
    batches: FolderBatches,
    models: dict[str, DCAE],
    networks: dict[str, Network],
    reference: Moments | None,
    exact: str | None = None,
) -> dict[str, Result]:
    """Each model's result on the pictures of all ranks, by model name.

    networks: the available networks of `NETWORKS`. reference: for rFID; None means the statistics of the pictures.
    exact: the model that the latents of the others are compared with.
    A single picture gives no rFID. If any model computes NaN or infinity for a picture, the picture is added to
    `batches.failed` and excluded for all models. The result is empty if no picture is left.
    """
    measured, originals = {name: Measured() for name in models}, MomentSums()
    for crops in progress(batches):
        indices, results = _reconstruct_all(batches, crops, models)
        if not indices:
            continue
        for name, result in results.items():
            _measure(measured[name], indices, networks, result)
            if exact not in (None, name):
                measured[name].add(LATENT_ERROR, indices, _relative_errors(result.z, results[exact].z))
        if "fid" in networks and reference is None:
            originals.add(networks["fid"](next(iter(results.values())).x))
    for each in measured.values():
        each.gather()
    pictures = len(next(iter(measured.values())).latents)
    if not pictures:
        return {}
    if "fid" not in networks or pictures < 2:
        reference = None
    elif reference is None:
        reference = originals.moments()
    return {name: _result(each, reference) for name, each in measured.items()}


class Reconstructed(NamedTuple):
    """x, y: pictures and reconstructions, uint8 [n, 3, H, W]. z: latents. finite: per picture, whether y and z are."""

    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor
    finite: list[bool]

    def take(self, rows: list[int]) -> "Reconstructed":
        return Reconstructed(self.x[rows], self.y[rows], self.z[rows], [self.finite[row] for row in rows])


@torch.inference_mode()
def reconstruct(model: DCAE, pixels: torch.Tensor) -> Reconstructed:
    """Encodes and decodes pixels, uint8 [n, H, W, 3]. The results are on the model's device.

    As in DC-Gen, x is the pictures after rounding to the model's dtype.
    """
    weight = next(model.parameters())
    x = channels_first(pixels.to(weight.device, non_blocking=True)).float().div_(255).mul_(2).sub_(1).to(weight.dtype)
    z = model.encode(x)
    y = model.decode(z)
    finite = [a and b for a, b in zip(finite_rows(z), finite_rows(y), strict=True)]
    return Reconstructed(images.to_uint8(x), images.to_uint8(y), z, finite)


def _reconstruct_all(
    batches: FolderBatches, crops: Crops, models: dict[str, DCAE]
) -> tuple[list[int], dict[str, Reconstructed]]:
    """The numbers of the pictures for which all models give finite results, and each model's results for them."""
    results = {name: reconstruct(model, crops.pixels) for name, model in models.items()}
    rows = []
    for row, index in enumerate(crops.indices):
        bad = [name for name, result in results.items() if not result.finite[row]]
        if bad:
            reason = not_finite_message([f"the reconstruction by {name}" for name in bad], results[bad[0]].z.dtype)
            batches.failed.append((batches.pictures.items[index].name, reason))
        else:
            rows.append(row)
    if len(rows) < len(crops.indices):
        results = {name: result.take(rows) for name, result in results.items()}
    return [crops.indices[row] for row in rows], results


def _measure(measured: Measured, indices: list[int], networks: dict[str, Network], batch: Reconstructed) -> None:
    """Adds a batch to the results of one model."""
    x, y, z, _ = batch
    measured.latents |= {i: Sums.of(each.numpy()) for i, each in zip(indices, z.float().cpu(), strict=True)}
    measured.add("psnr", indices, images.psnr(y, x))
    for name in ("ssim", "lpips"):
        if name in networks:
            measured.add(name, indices, networks[name](y, x))
    if "clip_iqa" in networks:
        measured.add("clip_iqa", indices, networks["clip_iqa"](y))
    if "fid" in networks:
        measured.moments.add(networks["fid"](y))


def _relative_errors(z: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """‖z - exact‖ / ‖exact‖ of each latent."""
    difference, exact = (each.flatten(1).double().norm(dim=1) for each in (z.double() - exact.double(), exact))
    return difference / exact


def _result(measured: Measured, reference: Moments | None) -> Result:
    figures = statistics(measured.latents.values())
    figures |= {name: math.fsum(each.values()) / len(each) for name, each in measured.scores.items()}
    if reference is not None:
        moments = measured.moments.moments()
        if len(reference.mu) != len(moments.mu):
            raise DataError(f"--reference: has features of length {len(reference.mu)}; expected {len(moments.mu)}")
        figures["rfid"] = frechet_distance(moments, reference)
    columns = [name for name in (*COLUMNS, LATENT_ERROR) if name in figures]
    return Result({name: figures[name] for name in columns}, measured.scores["psnr"])


def examples(batches: FolderBatches, models: dict[str, DCAE], psnr: dict[int, float]) -> Image.Image:
    """A sheet with the pictures of best, median and worst PSNR: a row per picture, with each model's reconstruction.

    With fewer than three pictures, each picture has one row.
    """
    order = sorted(psnr, key=lambda index: (-psnr[index], index))
    titles = {order[len(order) // 2]: "median"}
    titles |= {order[-1]: "worst"}  # replaces the title of the same picture
    titles |= {order[0]: "best"}
    rows = []
    for index in sorted(titles, key=order.index):
        pixels = collate([batches.crops([index])[0]]).pixels
        row = []
        for name, model in models.items():
            x, y, _, _ = reconstruct(model, pixels)
            if not row:
                row.append((images.to_image(x), "original"))
            row.append((images.to_image(y), f"{name}, PSNR {images.psnr(y, x).item():.2f} dB"))
        rows.append(images.side_by_side(row, f"{titles[index]}: {batches.pictures.items[index].name}"))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:number])))
    return sheet
