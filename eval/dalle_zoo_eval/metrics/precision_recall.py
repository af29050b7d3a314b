"""Precision and recall: share of each side that is inside the manifold of the other side."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS, check_sides
from dalle_zoo_eval.metrics.estimates import bootstrapped
from dalle_zoo_eval.moments import StatisticsError, in_batches

# G generated images, R reference images, n samples, d features

ROWS, COLUMNS = 512, 4096
"""Size of a tile of distances: memory grows with the number of samples, not with its square."""
SOURCE = "Kynkäänniemi et al., 2019"
INTERVAL = "bootstrap over the images of the share"


@METRICS.register(
    "precision", extractor="inception-2015", label="Precision", source=SOURCE, least=10_000, interval=INTERVAL
)
def precision(features: Tensor, real_features: Tensor, *, k: int = 3) -> dict[str, float]:
    """Returns the share of generated images that are near a reference image, with its interval.

    An image is near if it is within the sphere around a reference image that reaches the k-th nearest neighbor of that
    image in the reference. Distances are float64. Features that are equal up to rounding have distance 0, unlike in
    torch-fidelity.

    Reference: Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019). It
    uses features of VGG-16. The protocols here use those of Inception, so the values are not comparable.

    Args:
        features: Features of the generated side, (G, d).
        real_features: Features of the reference side, (R, d).
        k: Number of neighbors, less than R and G. Defaults to 3.

    Raises:
        ValueError: Features have different lengths.
        StatisticsError: A side has too few samples.

    Example:
        >>> real = torch.arange(10.0).view(10, 1)
        >>> precision(real[:5], real)["value"], precision(real + 100, real)["value"]
        (1.0, 0.0)
    """
    check_neighbors(features, real_features, k)
    return _share_within(features, real_features, k)


@METRICS.register("recall", extractor="inception-2015", label="Recall", source=SOURCE, least=10_000, interval=INTERVAL)
def recall(features: Tensor, real_features: Tensor, *, k: int = 3) -> dict[str, float]:
    """Returns the share of reference images near a generated image; arguments and errors as in `precision`.

    Example:
        >>> real = torch.arange(10.0).view(10, 1)
        >>> recall(real[:5], real)["value"]  # images 0 to 4 reach up to 7
        0.8
    """
    check_neighbors(features, real_features, k)
    return _share_within(real_features, features, k)


def check_neighbors(a: Tensor, b: Tensor, k: int) -> None:
    """Raises an error unless both sides have features of one length, and more samples than ``k`` neighbors."""
    check_sides(a, b)
    if not 1 <= k < min(len(a), len(b)):
        raise StatisticsError(f"{k} neighbors need more samples, got {min(len(a), len(b))}")


def squared_radii(centers: Tensor, k: int) -> Tensor:
    """Returns the squared distance of each center to its k-th nearest neighbor, (n,)."""
    # Each center is its own nearest neighbor, hence k + 1.
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
        # For equal features, the difference is only rounding.
        parts.append(torch.where(distances <= 1e-12 * sum_of_squares, 0, distances))
    return torch.cat(parts, 1)


def _share_within(points: Tensor, centers: Tensor, k: int) -> dict[str, float]:
    """Returns the share of points inside the sphere of some center, with its interval."""
    radii = squared_radii(centers, k)
    inside = [(squared_distances(rows, centers) <= radii).any(1) for rows in in_batches(points, ROWS)]
    return bootstrapped(torch.cat(inside)).annotated()
