"""What generated pictures are compared with: statistics and features of real ones."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dcae_fast import distributed
from dcae_fast.errors import DataError
from dcae_fast.files import save_npy

from .moments import MomentSums
from .networks import Network
from .pictures import FolderBatches, NpzBatches, channels_first, progress


@dataclass(frozen=True)
class Wanted:
    """Files to write, or None.

    fid: .npz of the mean and covariance of Inception's features; precision_recall: .npy of these features, [N, 2048];
    cmmd: .npy of CLIP's embeddings, [N, 768]; both in the order of the pictures.
    """

    fid: Path | None
    precision_recall: Path | None
    cmmd: Path | None

    @property
    def networks(self) -> list[str]:
        names = ["fid"] if self.fid or self.precision_recall else []
        return names + (["cmmd"] if self.cmmd else [])


def write_references(
    batches: FolderBatches | NpzBatches, wanted: Wanted, networks: dict[str, Network], device: torch.device
) -> list[Path]:
    """Writes those files whose networks ("fid", "cmmd") are given, all ranks together; returns them.

    Raises DataError for files that cannot be read, and where there are too few pictures.
    """
    if not networks:
        return []
    sums, kept = MomentSums(), {"fid": [], "cmmd": []}
    keep = {"fid": wanted.precision_recall, "cmmd": wanted.cmmd}
    for crops in progress(batches):
        pictures = channels_first(crops.pixels.to(device, non_blocking=True))
        for name, network in networks.items():
            features = network(pictures).float()
            if name == "fid":
                sums.add(features)
            if keep[name]:
                kept[name].append(features.cpu().numpy())
    written = []
    if wanted.fid and "fid" in networks:
        moments = sums.moments()
        if distributed.is_main():
            moments.save(wanted.fid)
        written.append(wanted.fid)
    for name in networks:
        if keep[name]:
            _save_features(kept[name], keep[name])
            written.append(keep[name])
    return written


def _save_features(mine: list[np.ndarray], path: Path) -> None:
    """The ranks' features, one after another, as a float32 .npy file; written by the main process."""
    parts = [part for rank in distributed.all_gather(mine) for part in rank]
    if not parts:
        raise DataError("no pictures could be read")
    if distributed.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_npy(path, np.concatenate(parts))


def load_features(path: Path) -> torch.Tensor:
    """Features [N, F] of an .npy file, float32. Raises DataError."""
    try:
        features = np.load(path)
    except Exception as error:  # numpy raises anything for a broken file
        reason = getattr(error, "strerror", None) or "this is none"  # numpy's reason advises to unpickle the file
        raise DataError(f"{path}: expected an .npy file of features: {reason}") from error
    if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind != "f":
        raise DataError(f"{path}: expected floating-point features [N, F]")
    if not np.isfinite(features).all():
        raise DataError(f"{path}: NaN or infinity in the features; make it anew with reference-stats")
    return torch.from_numpy(features.astype(np.float32))
