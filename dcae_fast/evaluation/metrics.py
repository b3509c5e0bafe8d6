"""Metrics of sets of pictures, from features that a network has made of them; none of them needs its weights."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from dcae_fast.errors import DataError

from .moments import Moments

ROWS = 4096  # of a matrix of distances, at once
SPLITS = 10  # of the samples, for the inception score
NEIGHBOURS = 3  # of a picture, for precision and recall


def frechet_distance(one: Moments, other: Moments) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 √(Σ1 Σ2)), of which FID is the case of Inception's features.

    If the root is not finite, 1e-6 is added to both diagonals, as pytorch-fid does; its imaginary part is rounding.
    Raises DataError where the features differ in length.
    """
    from scipy.linalg import LinAlgWarning, sqrtm

    if one.mu.shape != other.mu.shape:
        raise DataError(f"statistics of {len(one.mu)} and of {len(other.mu)} features; expected as many")
    with warnings.catch_warnings():  # a covariance of fewer pictures than features is singular, which is no fault
        warnings.simplefilter("ignore", LinAlgWarning)
        root = sqrtm(one.sigma @ other.sigma)
        if not np.isfinite(root).all():
            ridge = 1e-6 * np.eye(len(one.mu))
            root = sqrtm((one.sigma + ridge) @ (other.sigma + ridge))
    difference = one.mu - other.mu
    traces = np.trace(one.sigma) + np.trace(other.sigma) - 2 * np.trace(root.real)
    return float(difference @ difference + traces)


def inception_score(logits: torch.Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp(mean KL(p(y | x) ‖ p(y))) over each of the splits, in fp64: the mean and the population's deviation.

    logits [N, classes]; rows are permuted first by NumPy's RandomState(2020), as torch-fidelity does. Raises ValueError
    where there are fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples; the inception score needs {splits} at least")
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
    """Shares of the samples inside the reference's manifold, and of the reference inside the samples'.

    A manifold is the union of balls around its features [N, F], each as wide as to its `neighbours`-th nearest.
    Raises ValueError where a set is too small for that.
    """
    if min(len(samples), len(reference)) <= neighbours:
        sizes = f"{len(samples)} samples and {len(reference)} reference pictures"
        raise ValueError(f"{sizes}; precision and recall need more than {neighbours} of both")
    return _inside(samples, reference, neighbours), _inside(reference, samples, neighbours)


def _inside(points: torch.Tensor, centres: torch.Tensor, neighbours: int) -> float:
    """The share of the points that lie in at least one ball."""
    radii = torch.cat([d.kthvalue(neighbours + 1).values for d in _distances(centres, centres)])  # one is itself
    inside = [(d <= radii).any(1).sum().item() for d in _distances(points, centres)]
    return sum(inside) / len(points)


def _distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """|a_i - b_j|², some rows at a time. Sums of squares and a product, in fp64, where nothing cancels."""
    b = b.double()
    for rows in a.split(ROWS):
        rows = rows.double()
        squares = rows.square().sum(1, keepdim=True) + b.square().sum(1)
        yield squares.addmm_(rows, b.T, alpha=-2)


def maximum_mean_discrepancy(one: torch.Tensor, other: torch.Tensor, sigma: float = 10.0, scale: float = 1000) -> float:
    """scale · MMD², biased, with the kernel exp(-|a - b|² / 2σ²); CMMD is the case of CLIP's embeddings [N, E].

    The longer of the two is cut to the length of the shorter, as in the original.
    """
    n = min(len(one), len(other))
    one, other = one[:n], other[:n]

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.fsum((-d / (2 * sigma**2)).exp().sum().item() for d in _distances(a, b)) / n**2

    return scale * (mean(one, one) + mean(other, other) - 2 * mean(one, other))
