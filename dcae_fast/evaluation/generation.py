"""Samples of a diffusion model, batch by batch, and how close they are to real pictures.

The noise of a batch has a generator of its own, so that the samples depend on neither the number of ranks nor on where
a run was ended and went on. The original has one generator per rank, seeded seed + rank, that runs on across batches.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from dcae_fast import distributed, images
from dcae_fast import sample as sampling
from dcae_fast.data.manifest import tensors_hash
from dcae_fast.diffusion import DCAEDiffusion
from dcae_fast.errors import DataError, NotFiniteError
from dcae_fast.files import leftovers, writing, written_atomically
from dcae_fast.lock import is_unused

from .labels import class_labels
from .metrics import NEIGHBOURS, SPLITS, frechet_distance, inception_score, maximum_mean_discrepancy, precision_recall
from .moments import Moments
from .networks import Network
from .references import load_features

MANIFEST = "samples.json"
HASH = "sha256"


@dataclass(frozen=True)
class Settings:
    """What all samples of a folder share.

    model: as the user named it; weights: hash of the transformer's and the autoencoder's; patch, dtype: how it
    computes; samples: how many; batch: so many at once; cfg, sampler, steps: see `sample.Request`; seed: of the noise;
    class_seed: of the classes.
    """

    model: str
    weights: str
    dtype: str
    patch: bool
    samples: int
    batch: int
    cfg: float
    sampler: str
    steps: int
    seed: int
    class_seed: int

    def noise_seed(self, number: int) -> int:
        """Of a batch's generator: the seeds of different runs and batches have nothing in common."""
        return int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class References:
    """What samples are compared with, where it is given: see `references.Wanted`."""

    fid: Moments | None = None
    precision_recall: torch.Tensor | None = None
    cmmd: torch.Tensor | None = None

    @classmethod
    def load(cls, fid: Path | None, precision_recall: Path | None, cmmd: Path | None) -> "References":
        """Of files of reference-stats, those that are given. Raises DataError."""
        return cls(
            None if fid is None else Moments.load(fid),
            None if precision_recall is None else load_features(precision_recall),
            None if cmmd is None else load_features(cmmd),
        )

    @property
    def networks(self) -> list[str]:
        with_features = self.fid is not None or self.precision_recall is not None
        return ["inception_score"] + ["fid"] * with_features + ["cmmd"] * (self.cmmd is not None)

    def check(self, networks: dict[str, Network], device: torch.device, samples: int, prefix: str = "") -> None:
        """Raises DataError where a reference is not of the features that a network makes, or pictures are too few.

        prefix: of the options' names in the message.
        """
        blank = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
        lengths = {name: network(blank).shape[1] for name, network in networks.items()}
        for option, reference, network, least in (
            ("fid", self.fid, "fid", 2),
            ("precision-recall", self.precision_recall, "fid", NEIGHBOURS + 1),
            ("cmmd", self.cmmd, "cmmd", 1),
        ):
            if reference is None:
                continue
            if samples < least:
                raise DataError(f"--{prefix}samples {samples}: expected at least {least} for --{prefix}{option}")
            rows, length = (least, len(reference.mu)) if isinstance(reference, Moments) else reference.shape
            if rows < least:
                raise DataError(f"--{prefix}{option}: has {rows} pictures; expected at least {least}")
            expected = lengths.get(network, length)
            if length != expected:
                raise DataError(f"--{prefix}{option}: its features have length {length}; expected {expected}")


class SampleFolder:
    """The samples' features, labels and, for an .npz file, pixels, one safetensors file for each batch; PNG files.

    Every file is whole or absent; a batch's has a hash of its content. save: keep the pictures as PNG files, in
    samples.npz, or not.
    """

    def __init__(self, folder: Path, settings: Settings, classes: int, save: Literal["png", "npz", "none"]):
        self.folder, self.settings, self.save = folder, settings, save
        self.labels = class_labels(settings.samples, classes, settings.class_seed)
        self.batches = -(-settings.samples // settings.batch)

    def prepare(self) -> None:
        """Makes the folder, or checks that what is there has the same settings: else DataError.

        What killed processes left half written is removed.
        """
        path, settings = self.folder / MANIFEST, asdict(self.settings)
        if path.exists():
            try:
                before = json.loads(path.read_text())
            except ValueError as error:
                raise DataError(f"{path}: not a manifest of samples: {error}") from error
            if not isinstance(before, dict):
                raise DataError(f"{path}: not a manifest of samples: {before!r}")
            if before != settings:
                names = [name for name in settings if before.get(name) != settings[name]]
                changes = ", ".join(f"{name} {before.get(name)}, now {settings[name]}" for name in names)
                raise DataError(f"{self.folder} has samples with {changes}; take another folder")
        elif not is_unused(self.folder):
            raise DataError(f"{self.folder} is not empty and has no {MANIFEST}; take another folder")
        for leftover in leftovers(self.folder):
            leftover.unlink()
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_atomically(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n")
            for name in ("batches", *(["samples"] if self.save == "png" else [])):
                (self.folder / name).mkdir(exist_ok=True)

    def indices(self, number: int) -> range:
        first = number * self.settings.batch
        return range(first, min(first + self.settings.batch, self.settings.samples))

    def is_whole(self, number: int, networks: dict[str, Network]) -> bool:
        """Whether a batch has what the networks make of it, and its pictures, all as they were written."""
        try:
            with safe_open(self._path(number), framework="pt") as file:
                names, written = set(file.keys()), (file.metadata() or {}).get(HASH)
                tensors = {name: file.get_tensor(name) for name in names} if written else {}
        except (OSError, SafetensorError):
            return False
        if not names.issuperset(networks) or (self.save == "npz" and "pictures" not in names):
            return False
        if written and written != tensors_hash(tensors):  # files of earlier versions have none
            return False
        return self.save != "png" or all(images.is_whole_png(self._png(index)) for index in self.indices(number))

    def write(self, number: int, pictures: torch.Tensor, features: dict[str, torch.Tensor]) -> None:
        """A batch: pictures uint8 [n, 3, H, W] on the CPU, and features by the networks' names."""
        indices = self.indices(number)
        if self.save == "png":
            for index, picture in zip(indices, pictures, strict=True):
                images.save_png(images.to_image(picture[None]), self._png(index))
        tensors = {name: each.float().cpu().contiguous() for name, each in features.items()}
        if self.save == "npz":
            tensors["pictures"] = pictures.permute(0, 2, 3, 1).contiguous()
        tensors["labels"] = self.labels[indices.start : indices.stop]
        with written_atomically(self._path(number)) as temporary:
            save_file(tensors, temporary, {HASH: tensors_hash(tensors)})

    def read(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor of all batches, in their order."""
        for number in range(self.batches):
            with safe_open(self._path(number), framework="pt") as file:
                yield file.get_tensor(name)

    def write_npz(self) -> Path:
        """samples.npz as ADM's: arr_0, the pictures uint8 [N, H, W, 3], and arr_1, the classes; batch by batch."""
        path = self.folder / "samples.npz"
        shape = (self.settings.samples, *next(self.read("pictures")).shape[1:])
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with written_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for pictures in self.read("pictures"):
                    file.write(pictures.numpy().tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, self.labels.numpy())
        return path

    def _path(self, number: int) -> Path:
        return self.folder / "batches" / f"{number:06d}.safetensors"

    def _png(self, index: int) -> Path:
        return self.folder / "samples" / f"{index:06d}_{self.labels[index]}.png"


@torch.inference_mode()
def generate(model: DCAEDiffusion, folder: SampleFolder, networks: dict[str, Network]) -> int:
    """Makes the batches that are not there, all ranks together; returns how many were there.

    Raises NotFiniteError on all ranks, after the other batches, if a batch is not finite; it is not written.
    """
    distributed.on_main(folder.prepare)
    mine = distributed.share(folder.batches)
    torn = [number for number in mine if not folder.is_whole(number, networks)]
    missing = [number for part in distributed.all_gather(torn) for number in part]
    settings, device = folder.settings, next(model.diffusion_model.parameters()).device
    bad = []
    with tqdm(unit="image", disable=None if distributed.is_main() else True) as bar:
        for part in distributed.share(len(missing)):
            indices = folder.indices(missing[part])
            labels = tuple(folder.labels[indices.start : indices.stop].tolist())
            seed = settings.noise_seed(missing[part])
            request = sampling.Request(labels, settings.cfg, seed, settings.sampler, settings.steps)
            try:
                pictures = sampling.decode(model, sampling.generate(model, request))
            except NotFiniteError as error:
                bad.append(f"batch {missing[part]}: {error}")
                continue
            there = pictures.to(device)
            folder.write(missing[part], pictures, {name: network(there) for name, network in networks.items()})
            bar.update(len(indices))
    bad = [each for part in distributed.all_gather(bad) for each in part]
    if bad:
        raise NotFiniteError(f"{len(bad)} of {folder.batches} batches are not finite: {bad[0]}")
    return folder.batches - len(missing)


def figures(folder: SampleFolder, references: References, names: set[str], device: torch.device) -> dict[str, float]:
    """What the samples' features give; names: of the networks that there were. Raises ValueError if they do not fit.

    Of fewer than ten samples there is no inception score.
    """
    result = {}
    if "fid" in names:
        features = torch.cat(list(folder.read("fid")))
    if references.fid is not None and "fid" in names:
        result["fid"] = frechet_distance(Moments.of(features), references.fid)
    if "inception_score" in names and folder.settings.samples >= SPLITS:
        score = inception_score(torch.cat(list(folder.read("inception_score"))))
        result |= dict(zip(("inception_score", "inception_score_std"), score, strict=True))
    if references.precision_recall is not None and "fid" in names:
        shares = precision_recall(features.to(device), references.precision_recall.to(device))
        result |= dict(zip(("precision", "recall"), shares, strict=True))
    if references.cmmd is not None and "cmmd" in names:
        embeddings = torch.cat(list(folder.read("cmmd"))).to(device)
        result["cmmd"] = maximum_mean_discrepancy(embeddings, references.cmmd.to(device))
    return result
