"""Precision and recall: how much of each side is inside the manifold of the other."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS, check_sides
from dalle_zoo_eval.metrics.estimates import bootstrapped
from dalle_zoo_eval.moments import StatisticsError, in_batches

# G generated, R reference, n samples, d features

ROWS, COLUMNS = 512, 4096
"""Tile of distances worked out at once: memory grows with the samples, not with their square."""
SOURCE = "Kynkäänniemi et al., 2019"
INTERVAL = "bootstrap over the images of the share"


@METRICS.register(
    "precision", extractor="inception-2015", label="Precision", source=SOURCE, least=10_000, interval=INTERVAL
)
def precision(features: Tensor, real_features: Tensor, *, k: int = 3) -> dict[str, float]:
    """Returns the share of generated images near the reference, with its interval.

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
    check_neighbors(features, real_features, k)
    return _share_within(features, real_features, k)


@METRICS.register("recall", extractor="inception-2015", label="Recall", source=SOURCE, least=10_000, interval=INTERVAL)
def recall(features: Tensor, real_features: Tensor, *, k: int = 3) -> dict[str, float]:
    """Returns the share of the reference near generated images; arguments and errors as in `precision`."""
    check_neighbors(features, real_features, k)
    return _share_within(real_features, features, k)


def check_neighbors(a: Tensor, b: Tensor, k: int) -> None:
    """Raises an error unless both sides have features of one length, and more samples than ``k`` neighbors."""
    check_sides(a, b)
    if not 1 <= k < min(len(a), len(b)):
        raise StatisticsError(f"{k} neighbors need more samples, got {min(len(a), len(b))}")


def squared_radii(centers: Tensor, k: int) -> Tensor:
    """Returns the squared distance of each center to its k-th nearest neighbor, (n,)."""
    # A center is its own nearest neighbor, hence one more.
    return torch.cat([squared_distances(rows, centers).kthvalue(k + 1).values for rows in in_batches(centers, ROWS)])


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Returns the squared distances of rows to all others, float64: (rows, d) and (n, d) to (rows, n)."""
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


def _share_within(points: Tensor, centers: Tensor, k: int) -> dict[str, float]:
    """Share of points inside a sphere of a center."""
    radii = squared_radii(centers, k)
    inside = [(squared_distances(rows, centers) <= radii).any(1) for rows in in_batches(points, ROWS)]
    return bootstrapped(torch.cat(inside)).annotated()
