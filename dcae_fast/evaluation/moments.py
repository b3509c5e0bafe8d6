"""Mean and covariance of features, summed over batches and ranks, and stored in .npz files as in DC-Gen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dcae_fast import distributed
from dcae_fast.errors import DataError
from dcae_fast.files import check_regular, written_atomically


@dataclass(frozen=True)
class Moments:
    """mu [F], sigma [F, F]: mean and covariance (divided by N - 1) in float64."""

    mu: np.ndarray
    sigma: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor) -> "Moments":
        """The moments of features [N, F]. Raises DataError for fewer than two features."""
        if len(features) < 2:
            raise DataError(f"{len(features)} pictures; a covariance needs at least 2")
        return cls(features.double().mean(0).numpy(), features.T.double().cov().numpy())

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, mu=self.mu, sigma=self.sigma)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Reads an .npz file of `save`, reference-stats or DC-Gen. Raises DataError."""
        try:
            check_regular(path)
            with np.load(path) as file:
                mu, sigma = (file[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
        except Exception as error:  # for a broken file, numpy, zipfile and zlib may raise any exception
            # not numpy's message, which would advise to unpickle the file
            reason = getattr(error, "strerror", None) or "not such a file"
            raise DataError(f"{path}: expected an .npz file with mu and sigma: {reason}") from error
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise DataError(f"{path}: mu {mu.shape} and sigma {sigma.shape}; expected (F,) and (F, F)")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise DataError(f"{path}: NaN or infinity in mu or sigma; write the file again with reference-stats")
        return cls(mu, sigma)


class MomentSums:
    """Sums of features f [n, F] in float64: count n, first = Σ f, second = Σ f fᵀ."""

    def __init__(self):
        self.count, self.first, self.second = 0, None, None

    def add(self, features: torch.Tensor) -> None:
        f = features.double()
        first, second = f.sum(0), f.T @ f
        if self.count:
            first, second = self.first + first, self.second + second
        self.count, self.first, self.second = self.count + len(f), first, second

    def moments(self) -> Moments:
        """The moments of all ranks' features. A rank may have none. Raises DataError for fewer than two in total."""
        parts = distributed.all_gather((self.count, len(self.first) if self.count else 0))
        n, width = sum(count for count, _ in parts), max(width for _, width in parts)
        if n < 2:
            raise DataError(f"{n} pictures; a covariance needs at least 2")
        if not self.count:
            self.first, self.second = torch.zeros(width).double(), torch.zeros(width, width).double()
        first, second = (distributed.all_sum(each.cpu()).numpy() for each in (self.first, self.second))
        mu = first / n
        return Moments(mu, (second - n * np.outer(mu, mu)) / (n - 1))
