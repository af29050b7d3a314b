"""Density and coverage: alternatives to precision and recall that are robust to outliers of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import bootstrapped
from dalle_zoo_eval.metrics.precision_recall import ROWS, check_neighbors, squared_distances, squared_radii
from dalle_zoo_eval.moments import in_batches

# G generated images, R reference images, d features

SOURCE = "Naeem et al., 2020"


@METRICS.register(
    "density", label="Density", source=SOURCE, least=1000, interval="bootstrap over the generated images"
)
def density(features: Tensor, real_features: Tensor, *, k: int = 5) -> dict[str, float]:
    """Returns the mean number of spheres of the reference that contain a generated image, divided by ``k``.

    A sphere reaches the k-th nearest neighbor of its center in the reference. The mean is 1 for equal distributions
    and may exceed 1. The result includes an interval.

    Reference: Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020).

    Args:
        features: Features of the generated side, (G, d).
        real_features: Features of the reference side, (R, d).
        k: Number of neighbors, less than R and G. Defaults to 5, as in the paper.

    Raises:
        ValueError: Features have different lengths.
        StatisticsError: A side has too few samples.

    Example:
        >>> real = torch.arange(8.0).view(8, 1)
        >>> density(real + 100, real, k=2)["value"]
        0.0
    """
    check_neighbors(features, real_features, k)
    radii = squared_radii(real_features, k)
    counts = [(squared_distances(rows, real_features) < radii).sum(1) for rows in in_batches(features, ROWS)]
    return bootstrapped(torch.cat(counts).double() / k).annotated()


@METRICS.register(
    "coverage", label="Coverage", source=SOURCE, least=1000, interval="bootstrap over the reference images"
)
def coverage(features: Tensor, real_features: Tensor, *, k: int = 5) -> dict[str, float]:
    """Returns the share of reference images whose sphere contains a generated image; otherwise as `density`.

    Example:
        >>> real = torch.arange(8.0).view(8, 1)
        >>> coverage(real, real, k=2)["value"], coverage(real[:4], real, k=2)["value"]  # half of the images
        (1.0, 0.5)
    """
    check_neighbors(features, real_features, k)
    radii = squared_radii(real_features, k)
    nearest = [squared_distances(rows, features).min(1).values for rows in in_batches(real_features, ROWS)]
    return bootstrapped(torch.cat(nearest) < radii).annotated()
