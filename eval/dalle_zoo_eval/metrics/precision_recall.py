"""Precision and recall: how much of each side is inside the manifold of the other."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.moments import StatisticsError, in_batches

# G generated, R reference, n samples, d features

ROWS, COLUMNS = 512, 4096
"""Tile of distances worked out at once: memory grows with the samples, not with their square."""


@METRICS.register("precision", extractor="inception-2015", label="Precision")
def precision(features: Tensor, real_features: Tensor, *, k: int = 3) -> float:
    """Returns the share of generated images near the reference.

    Near means within a sphere around an image of the other side that reaches its k-th nearest neighbor of its own
    side. Distances are float64, and features that agree to rounding have distance 0, which torch-fidelity's do not.

    Reference: Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019). It
    takes features of VGG-16; the protocols here take those of Inception, so their values do not compare with its own.

    Args:
        features: (G, d) of the generated side.
        real_features: (R, d) of the reference.
        k: Neighbors, fewer than R and G.

    Raises:
        ValueError: Features of different lengths.
        StatisticsError: Too few samples.
    """
    _check(features, real_features, k)
    return _share_within(features, real_features, k)


@METRICS.register("recall", extractor="inception-2015", label="Recall")
def recall(features: Tensor, real_features: Tensor, *, k: int = 3) -> float:
    """Returns the share of the reference near generated images; arguments and errors as in `precision`."""
    _check(features, real_features, k)
    return _share_within(real_features, features, k)


def _check(a: Tensor, b: Tensor, k: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (n, d) with one d, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not 1 <= k < min(len(a), len(b)):
        raise StatisticsError(f"{k} neighbors need more samples, got {min(len(a), len(b))}")


def _share_within(points: Tensor, centers: Tensor, k: int) -> float:
    """Share of points inside a sphere of a center."""
    # A center is its own nearest neighbor, hence one more.
    radii = torch.cat([_squared_distances(rows, centers).kthvalue(k + 1).values for rows in in_batches(centers, ROWS)])
    inside = [(_squared_distances(rows, centers) <= radii).any(1) for rows in in_batches(points, ROWS)]
    return float(torch.cat(inside).double().mean())


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(rows, n)."""
    x = x.double()
    squares = x.square().sum(1, keepdim=True)
    parts = []
    for tile in in_batches(y, COLUMNS):
        tile = tile.double()
        sum_of_squares = squares + tile.square().sum(1)
        distances = sum_of_squares - 2 * x @ tile.t()
        # The difference of equal features is rounding alone.
        parts.append(torch.where(distances <= 1e-12 * sum_of_squares, 0, distances))
    return torch.cat(parts, 1)
