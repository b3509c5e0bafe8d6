"""Mean and covariance of features, summed over batches and ranks; the .npz files of the original."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dcae_fast import distributed
from dcae_fast.errors import DataError
from dcae_fast.files import written_atomically


@dataclass(frozen=True)
class Moments:
    """mu [F], sigma [F, F]: mean and covariance (N - 1) in fp64."""

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor) -> "Moments":
        """Of features [N, F]. Raises DataError where there are fewer than two."""
        if len(features) < 2:
            raise DataError(f"{len(features)} pictures; a covariance needs two at least")
        return cls(features.double().mean(0).numpy(), features.T.double().cov().numpy())

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=self.mu, sigma=self.sigma)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Raises DataError."""
        try:
            with np.load(path) as file:
                mu, sigma = (file[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
        except Exception as error:  # numpy, zipfile and zlib raise anything for a broken file
            reason = getattr(error, "strerror", None) or "this is none"  # numpy's reason advises to unpickle the file
            raise DataError(f"{path}: expected an .npz file with mu and sigma: {reason}") from error
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise DataError(f"{path}: mu {mu.shape} and sigma {sigma.shape}; expected (F,) and (F, F)")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DataError(f"{path}: NaN or infinity in mu or sigma; make it anew with reference-stats")
        return cls(mu, sigma)


class MomentSums:
    """Σ f and Σ f fᵀ of features [n, F], in fp64."""

    def __init__(self):
        self.count, self.first, self.second = 0, None, None

    def add(self, features: torch.Tensor) -> None:
        f = features.double()
        first, second = f.sum(0), f.T @ f
        if self.count:
            first, second = self.first + first, self.second + second
        self.count, self.first, self.second = self.count + len(f), first, second

    def moments(self) -> Moments:
        """Of the features of all ranks, some of which may have none; DataError of fewer than two."""
        parts = distributed.all_gather((self.count, len(self.first) if self.count else 0))
        n, width = sum(count for count, _ in parts), max(width for _, width in parts)
        if n < 2:
            raise DataError(f"{n} pictures; a covariance needs two at least")
        if not self.count:
            self.first, self.second = torch.zeros(width).double(), torch.zeros(width, width).double()
        first, second = (distributed.all_sum(each.cpu()).numpy() for each in (self.first, self.second))
        mu = first / n
        return Moments(mu, (second - n * np.outer(mu, mu)) / (n - 1))
