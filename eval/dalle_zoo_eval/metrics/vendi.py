"""Vendi score: the effective number of distinct images in a set."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import Estimate, interval_of_mean
from dalle_zoo_eval.moments import above_rounding

# n samples, d features


@METRICS.register(
    "vendi", label="Vendi score", format=".2f", source="Friedman and Dieng, 2023", least=1000,
    interval="bootstrap of the linear part of the entropy",
)  # fmt: skip
def vendi_score(features: Tensor) -> dict[str, float]:
    """Returns the exponential of the entropy of the eigenvalues of the cosine similarities, with its interval.

    The score is 1 if all images are equal and n if all are orthogonal. It needs no reference. Scores of sets of
    different sizes are not comparable.

    Reference: The Vendi Score: A Diversity Evaluation Metric for Machine Learning (Friedman and Dieng, 2023).

    Args:
        features: Features of the images, (n, d).

    Example:
        >>> [round(vendi_score(features)["value"], 3) for features in (torch.eye(3), torch.ones(3, 3))]
        [3.0, 1.0]
    """
    rows = F.normalize(features.double(), dim=1)
    # The matrix (d, d) has the nonzero eigenvalues of the similarities (n, n) divided by n.
    values, vectors = torch.linalg.eigh(rows.t() @ rows / len(rows))
    logarithms = values.clamp(min=torch.finfo(torch.float64).tiny).log()
    entropy = -float((values.clamp(min=0) * logarithms).sum())
    # The influence of a sample x on the entropy is -x^T log(S) x minus its mean. Directions without samples add none.
    spread = (rows @ vectors).square()
    retained = above_rounding(values)
    influences = -(spread[:, retained] @ logarithms[retained])
    low, high = interval_of_mean(influences - influences.mean())
    score = math.exp(entropy)
    return Estimate(score, score * math.exp(low), score * math.exp(high)).annotated()
