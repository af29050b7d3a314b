"""Density and coverage: precision and recall that outliers of the reference do not inflate."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import bootstrapped
from dalle_zoo_eval.metrics.precision_recall import ROWS, check_neighbors, squared_distances, squared_radii
from dalle_zoo_eval.moments import in_batches

# G generated, R reference, d features

SOURCE = "Naeem et al., 2020"


@METRICS.register(
    "density", label="Density", source=SOURCE, least=1000, interval="bootstrap over the generated images"
)
def density(features: Tensor, real_features: Tensor, *, k: int = 5) -> dict[str, float]:
    """Returns in how many spheres of the reference a generated image is, divided by ``k``, with its interval.

    A sphere reaches the k-th nearest neighbor of its center in the reference. The mean is 1 where both sides have one
    distribution, and may exceed 1.

    Reference: Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020).

    Args:
        features: (G, d) of the generated side.
        real_features: (R, d) of the reference.
        k: Neighbors, fewer than R and G. Defaults to 5, as in the paper.

    Raises:
        ValueError: Features of different lengths.
        StatisticsError: Too few samples.
    """
    check_neighbors(features, real_features, k)
    radii = squared_radii(real_features, k)
    counts = [(squared_distances(rows, real_features) < radii).sum(1) for rows in in_batches(features, ROWS)]
    return bootstrapped(torch.cat(counts).double() / k).annotated()


@METRICS.register(
    "coverage", label="Coverage", source=SOURCE, least=1000, interval="bootstrap over the reference images"
)
def coverage(features: Tensor, real_features: Tensor, *, k: int = 5) -> dict[str, float]:
    """Returns the share of reference images whose sphere has a generated image in it; all else as in `density`."""
    check_neighbors(features, real_features, k)
    radii = squared_radii(real_features, k)
    nearest = [squared_distances(rows, features).min(1).values for rows in in_batches(real_features, ROWS)]
    return bootstrapped(torch.cat(nearest) < radii).annotated()
