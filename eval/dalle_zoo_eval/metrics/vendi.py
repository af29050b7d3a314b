"""Vendi score: the effective number of different images in one set."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import Estimate, interval_of_mean

# n samples, d features


@METRICS.register(
    "vendi", label="Vendi score", format=".2f", source="Friedman and Dieng, 2023", least=1000,
    interval="bootstrap of the linear part of the entropy",
)  # fmt: skip
def vendi_score(features: Tensor) -> dict[str, float]:
    """Returns the exponential of the entropy of the eigenvalues of the cosine similarities, with its interval.

    It is between 1, if all images are the same, and n, if all are orthogonal. It needs no reference. Sets of different
    sizes do not compare.

    Reference: The Vendi Score: A Diversity Evaluation Metric for Machine Learning (Friedman and Dieng, 2023).

    Args:
        features: (n, d).
    """
    rows = F.normalize(features.double(), dim=1)
    # The matrix (d, d) has the nonzero eigenvalues of the similarities (n, n) divided by n.
    values, vectors = torch.linalg.eigh(rows.t() @ rows / len(rows))
    logarithms = values.clamp(min=torch.finfo(torch.float64).tiny).log()
    entropy = -float((values.clamp(min=0) * logarithms).sum())
    # A sample x changes the entropy by -x^T log(S) x less its mean. Directions that no sample has add nothing.
    spread = (rows @ vectors).square()
    influences = -(spread[:, values > _rounding(values)] @ logarithms[values > _rounding(values)])
    low, high = interval_of_mean(influences - influences.mean())
    score = math.exp(entropy)
    return Estimate(score, score * math.exp(low), score * math.exp(high)).annotated()


def _rounding(values: Tensor) -> float:
    return len(values) * torch.finfo(torch.float64).eps * float(values[-1])
