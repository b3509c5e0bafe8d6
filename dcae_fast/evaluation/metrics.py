"""Metrics of sets of pictures, computed from features. No network is needed here."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from dcae_fast.errors import DataError

from .moments import Moments

ROWS = 4096  # of a distance matrix, computed at once
SPLITS = 10  # number of parts of the samples, for the inception score
NEIGHBOURS = 3  # k of the k-th nearest neighbour, for precision and recall


def frechet_distance(one: Moments, other: Moments) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 √(Σ1 Σ2)). With Inception features, this is the FID.

    If the root is not finite, 1e-6 is added to both diagonals, as in pytorch-fid. The imaginary part of the root is a
    rounding error and ignored. Raises DataError if the features differ in length.
    """
    from scipy.linalg import LinAlgWarning, sqrtm

    if one.mu.shape != other.mu.shape:
        raise DataError(f"statistics of {len(one.mu)} and {len(other.mu)} features; expected equal numbers")
    with warnings.catch_warnings():  # with fewer pictures than features, the covariance is singular: no reason to warn
        warnings.simplefilter("ignore", LinAlgWarning)
        root = sqrtm(one.sigma @ other.sigma)
        if not np.isfinite(root).all():
            ridge = 1e-6 * np.eye(len(one.mu))
            root = sqrtm((one.sigma + ridge) @ (other.sigma + ridge))
    difference = one.mu - other.mu
    traces = np.trace(one.sigma) + np.trace(other.sigma) - 2 * np.trace(root.real)
    return float(difference @ difference + traces)


def inception_score(logits: torch.Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp(mean KL(p(y | x) ‖ p(y))) of each split, in float64; returns the mean and population std over the splits.

    logits: [N, classes]. As in torch-fidelity, the rows are first permuted by NumPy's RandomState(2020). Raises
    ValueError if there are fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples; the inception score needs at least {splits}")
    order = np.random.RandomState(2020).permutation(len(logits))
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1)
    scores = []
    for part in range(splits):
        rows = log_p[len(log_p) * part // splits : len(log_p) * (part + 1) // splits]
        marginal = rows.exp().mean(0, keepdim=True)
        scores.append((rows.exp() * (rows - marginal.log())).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    samples: torch.Tensor, reference: torch.Tensor, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Precision, the fraction of samples in the reference manifold; recall, the fraction of references in the sample's.

    A set's manifold is the union of balls around its features [N, F]; a ball reaches to the `neighbours`-th nearest
    feature of the set. Raises ValueError if a set has too few features.
    """
    if min(len(samples), len(reference)) <= neighbours:
        sizes = f"{len(samples)} samples and {len(reference)} reference pictures"
        raise ValueError(f"{sizes}; precision and recall need more than {neighbours} of both")
    return _inside(samples, reference, neighbours), _inside(reference, samples, neighbours)


def _inside(points: torch.Tensor, centres: torch.Tensor, neighbours: int) -> float:
    """The fraction of the points that lie in at least one ball around the centres."""
    nearest = neighbours + 1  # the first is the centre itself
    radii = torch.cat([d.kthvalue(nearest).values for d in _distances(centres, centres)])
    inside = [(d <= radii).any(1).sum().item() for d in _distances(points, centres)]
    return sum(inside) / len(points)


def _distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """|a_i - b_j|² = |a_i|² + |b_j|² - 2 a_i·b_j, `ROWS` rows at a time; in float64, to make cancellation harmless."""
    b = b.double()
    for rows in a.split(ROWS):
        rows = rows.double()
        squares = rows.square().sum(1, keepdim=True) + b.square().sum(1)
        yield squares.addmm_(rows, b.T, alpha=-2)


def maximum_mean_discrepancy(one: torch.Tensor, other: torch.Tensor, sigma: float = 10.0, scale: float = 1000) -> float:
    """scale · MMD² (biased estimate) with the kernel exp(-|a - b|² / 2σ²). With CLIP embeddings [N, E], this is CMMD.

    As in DC-Gen, the longer set is truncated to the length of the shorter.
    """
    n = min(len(one), len(other))
    one, other = one[:n], other[:n]

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.fsum((-d / (2 * sigma**2)).exp().sum().item() for d in _distances(a, b)) / n**2

    return scale * (mean(one, one) + mean(other, other) - 2 * mean(one, other))
