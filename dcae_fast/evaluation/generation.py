"""Evaluation of diffusion models: generates samples batch by batch, and compares them with real pictures.

Each batch draws its noise from a separate generator, so that the samples do not depend on the number of ranks or on
interruptions. DC-Gen uses one generator per rank, seeded with seed + rank, for all batches.
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
    """The settings that all samples of a folder share.

    model: as the user named it. weights: hash of the transformer's and the autoencoder's weights. patch, dtype: of the
    computation. samples: total number. batch: pictures per batch. cfg, sampler, steps: see `sample.Request`. seed: of
    the noise. class_seed: of the classes. precision: of the autoencoder, as in `manifest.Settings`, and of the
    transformer unless it is exact.
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
    precision: str = "exact"

    def noise_seed(self, number: int) -> int:
        """The seed of a batch's generator. Seeds of different runs and batches are independent."""
        return int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class References:
    """Reference data that the samples are compared with; None if not given. See `references.OutputFiles`."""

    fid: Moments | None = None
    precision_recall: torch.Tensor | None = None
    cmmd: torch.Tensor | None = None

    @classmethod
    def load(cls, fid: Path | None, precision_recall: Path | None, cmmd: Path | None) -> "References":
        """Loads the given files of reference-stats. Raises DataError."""
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
        """Raises DataError if a reference and its network differ in feature length, or if there are too few pictures.

        prefix: of the option names in the message.
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
                raise DataError(f"--{prefix}{option}: has features of length {length}; expected {expected}")


class SampleFolder:
    """A folder of samples: a safetensors file per batch with features, labels and, for save="npz", pixels; PNG files.

    Every file is written atomically; a batch's file contains a hash of its content. save: keep the pictures as PNG
    files, in samples.npz, or not at all.
    """

    def __init__(self, folder: Path, settings: Settings, classes: int, save: Literal["png", "npz", "none"]):
        self.folder, self.settings, self.save = folder, settings, save
        self.labels = class_labels(settings.samples, classes, settings.class_seed)
        self.batches = -(-settings.samples // settings.batch)

    def prepare(self) -> None:
        """Makes the folder, or raises DataError if it contains samples with other settings.

        Removes temporary files of killed processes.
        """
        path, settings = self.folder / MANIFEST, asdict(self.settings)
        if path.exists():
            try:
                before = json.loads(path.read_text())
            except ValueError as error:
                raise DataError(f"{path}: not a manifest of samples: {error}") from error
            if not isinstance(before, dict):
                raise DataError(f"{path}: not a manifest of samples: {before!r}")
            before = {"precision": "exact"} | before  # as in earlier versions
            if before != settings:
                names = [name for name in settings if before.get(name) != settings[name]]
                changes = ", ".join(f"{name} {before.get(name)}, now {settings[name]}" for name in names)
                raise DataError(f"{self.folder} contains samples with {changes}; choose another folder")
        elif not is_unused(self.folder):
            raise DataError(f"{self.folder} is not empty and has no {MANIFEST}; choose another folder")
        for leftover in leftovers(self.folder):
            leftover.unlink()
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_atomically(path) as temporary:
                temporary.write_text(json.dumps(settings, indent=2) + "\n")
            for name in ("batches", *(["samples"] if self.save == "png" else [])):
                (self.folder / name).mkdir(exist_ok=True)

    def indices(self, number: int) -> range:
        """The numbers of the samples in a batch."""
        first = number * self.settings.batch
        return range(first, min(first + self.settings.batch, self.settings.samples))

    def is_complete(self, number: int, networks: dict[str, Network]) -> bool:
        """Whether a batch has undamaged features of all networks and, if requested, undamaged pictures."""
        try:
            with safe_open(self._path(number), framework="pt") as file:
                names, stored_hash = set(file.keys()), (file.metadata() or {}).get(HASH)
                tensors = {name: file.get_tensor(name) for name in names} if stored_hash else {}
        except (OSError, SafetensorError):
            return False
        if not names.issuperset(networks) or (self.save == "npz" and "pictures" not in names):
            return False
        if stored_hash and stored_hash != tensors_hash(tensors):  # files of earlier versions have no hash
            return False
        return self.save != "png" or all(images.is_whole_png(self._png(index)) for index in self.indices(number))

    def write(self, number: int, pictures: torch.Tensor, features: dict[str, torch.Tensor]) -> None:
        """Writes a batch. pictures: uint8 [n, 3, H, W] on the CPU; features: by network name."""
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
        """The tensors with this name of all batches, in order."""
        for number in range(self.batches):
            with safe_open(self._path(number), framework="pt") as file:
                yield file.get_tensor(name)

    def write_npz(self) -> Path:
        """Writes samples.npz in ADM's format: arr_0, pictures uint8 [N, H, W, 3], and arr_1, classes."""
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
    """Generates the missing batches, on all ranks together. Returns the number of batches that existed already.

    A batch that is not finite is not written; after all other batches, NotFiniteError is raised on all ranks.
    """
    distributed.on_main(folder.prepare)
    mine = distributed.share(folder.batches)
    incomplete = [number for number in mine if not folder.is_complete(number, networks)]
    missing = [number for part in distributed.all_gather(incomplete) for number in part]
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
            on_device = pictures.to(device)
            features = {name: network(on_device) for name, network in networks.items()}
            folder.write(missing[part], pictures, features)
            bar.update(len(indices))
    bad = [each for part in distributed.all_gather(bad) for each in part]
    if bad:
        raise NotFiniteError(f"{len(bad)} of {folder.batches} batches are not finite: {bad[0]}")
    return folder.batches - len(missing)


def figures(folder: SampleFolder, references: References, names: set[str], device: torch.device) -> dict[str, float]:
    """The metrics of the samples. names: of the available networks. Raises ValueError for references that do not fit.

    With fewer than ten samples, there is no inception score.
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
