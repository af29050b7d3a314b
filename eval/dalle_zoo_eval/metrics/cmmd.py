"""CMMD: maximum mean discrepancy of CLIP features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.metrics.base import METRICS, check_sides
from dalle_zoo_eval.metrics.estimates import shifted
from dalle_zoo_eval.metrics.precision_recall import ROWS, squared_distances
from dalle_zoo_eval.moments import in_batches

# n generated images, m reference images, d features

SIGMA = 10.0
"""Width of the Gaussian kernel."""
SCALE = 1000.0
"""Factor of the score, for readability."""


@METRICS.register(
    "cmmd", extractor="clip-l14-336", lower_is_better=True, label="CMMD", format=".3f",
    source="Jayasumana et al., 2024", least=1000, interval="bootstrap of the linear part",
)  # fmt: skip
def cmmd(features: Tensor, real_features: Tensor) -> dict[str, float]:
    """Returns 1000 times the squared maximum mean discrepancy with a Gaussian kernel of width 10, with its interval.

    The means of the kernel include the pairs of a sample with itself, as in the code of the paper, so the value is at
    least 0.

    Reference: Rethinking FID: Towards a Better Evaluation Metric for Image Generation (Jayasumana et al., 2024).

    Args:
        features: Features of the generated side, (n, d); they need not be unit vectors.
        real_features: Features of the reference side, (m, d).

    Raises:
        ValueError: Features have different lengths.

    Example:
        >>> features = torch.eye(4)
        >>> equal, opposite = (cmmd(features, sign * features)["value"] for sign in (1, -1))
        >>> abs(equal) < 1e-6 < opposite
        True
    """
    check_sides(features, real_features)
    x, y = (F.normalize(side.double(), dim=1) for side in (features, real_features))
    own, other, reference = _mean_kernel(x, x), _mean_kernel(x, y), _mean_kernel(y, y)
    value = own.mean() - 2 * other.mean() + reference.mean()
    influences = 2 * (own - other)
    return shifted(SCALE * float(value), SCALE * (influences - influences.mean())).annotated()


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Returns the mean of the kernel of each sample with all others, (n, d) and (m, d) to (n,)."""
    parts = [(squared_distances(rows, y) / (-2 * SIGMA**2)).exp().mean(1) for rows in in_batches(x, ROWS)]
    return torch.cat(parts)
