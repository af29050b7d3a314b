"""Precision and recall: how much of each side lies among the other."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_zoo_eval.metrics import in_batches

# G generated, R reference, n samples, d features

ROWS, COLUMNS = 512, 4096
"""Tile of distances worked out at once: memory grows with the samples, not with their square."""


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of generated images near the reference (precision) and the other way (recall).

    Near means within a sphere around an image of the other side that reaches its k-th nearest neighbor of its own
    side. Distances are float64, and features that agree to rounding have distance 0.

    Reference: Improved Precision and Recall Metric for Assessing Generative Models (Kynkaanniemi et al., 2019). It
    takes features of VGG-16; the protocols here take those of Inception, so their values do not compare with its own.

    Args:
        reference: (R, d).
        generated: (G, d).
        k: Neighbors, fewer than R and G.

    Raises:
        ValueError: Too few samples, or features of different lengths.
    """
    if reference.ndim != 2 or generated.ndim != 2 or reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must be (n, d) with one d, got {tuple(reference.shape)} and {tuple(generated.shape)}"
        )
    least = min(len(reference), len(generated))
    if not 1 <= k < least:
        raise ValueError(f"k must lie in 1..{least - 1} (one less than the smaller side), got {k}")
    return _share_within(generated, reference, k), _share_within(reference, generated, k)


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
