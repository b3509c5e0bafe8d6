"""Reference data for the metrics: statistics and features of real pictures, written by reference-stats."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dcae_fast import distributed
from dcae_fast.errors import DataError
from dcae_fast.files import check_regular, save_npy

from .moments import MomentSums
from .networks import Network
from .pictures import FolderBatches, NpzBatches, channels_first, progress


@dataclass(frozen=True)
class OutputFiles:
    """The reference files to write; None means not to write.

    fid: .npz file, mean and covariance of Inception features. precision_recall: .npy file, Inception features
    [N, 2048]. cmmd: .npy file, CLIP embeddings [N, 768]. Features are in the order of the pictures.
    """

    fid: Path | None
    precision_recall: Path | None
    cmmd: Path | None

    @property
    def networks(self) -> list[str]:
        names = ["fid"] if self.fid or self.precision_recall else []
        return names + (["cmmd"] if self.cmmd else [])


def write_references(
    batches: FolderBatches | NpzBatches, outputs: OutputFiles, networks: dict[str, Network], device: torch.device
) -> list[Path]:
    """Writes the files whose networks ("fid", "cmmd") are given, on all ranks together; returns their paths.

    Raises DataError if files cannot be read, or if there are too few pictures.
    """
    if not networks:
        return []
    sums, kept = MomentSums(), {"fid": [], "cmmd": []}
    keep = {"fid": outputs.precision_recall, "cmmd": outputs.cmmd}
    for crops in progress(batches):
        pictures = channels_first(crops.pixels.to(device, non_blocking=True))
        for name, network in networks.items():
            features = network(pictures).float()
            if name == "fid":
                sums.add(features)
            if keep[name]:
                kept[name].append(features.cpu().numpy())
    written = []
    if outputs.fid and "fid" in networks:
        moments = sums.moments()
        if distributed.is_main():
            moments.save(outputs.fid)
        written.append(outputs.fid)
    for name in networks:
        if keep[name]:
            _save_features(kept[name], keep[name])
            written.append(keep[name])
    return written


def _save_features(features: list[np.ndarray], path: Path) -> None:
    """Concatenates the features of all ranks; the main process writes them as a float32 .npy file."""
    parts = [part for rank in distributed.all_gather(features) for part in rank]
    if not parts:
        raise DataError(f"{path}: not written: none of the pictures could be read")
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_npy(path, np.concatenate(parts))


def load_features(path: Path) -> torch.Tensor:
    """Reads features [N, F] from an .npy file, as float32. Raises DataError."""
    try:
        check_regular(path)
        features = np.load(path)
    except Exception as error:  # for a broken file, numpy may raise any exception
        # not numpy's message, which would advise to unpickle the file
        reason = getattr(error, "strerror", None) or "not such a file"
        raise DataError(f"{path}: expected an .npy file of features: {reason}") from error
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind != "f":
        found = f"{features.dtype} {list(features.shape)}" if isinstance(features, np.ndarray) else "an archive"
        raise DataError(f"{path}: expected floating-point features [N, F], found {found}")
    if not np.isfinite(features).all():
        raise DataError(f"{path}: NaN or infinity in the features; write the file again with reference-stats")
    return torch.from_numpy(features.astype(np.float32))
