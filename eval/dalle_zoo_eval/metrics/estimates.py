"""Scores with bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 1000
"""Rounds of the bootstrap. With 1000, the ends of a 95 % interval vary by about 2 % of its width."""
LEVEL = 0.95
"""Confidence level of intervals."""
SEED = 0
"""Seed of the bootstrap, and of the order from which smaller sets are taken."""
BLOCK = 2**22
"""Number of resampled values in memory at once."""


class Estimate(NamedTuple):
    """A score, or part of a score, with its confidence interval."""

    value: float
    """The score."""
    low: float
    """Lower end of the bootstrap interval."""
    high: float
    """Upper end."""

    def annotated(self) -> dict[str, float]:
        """Returns the score of a metric with one value: ``value``, ``low`` and ``high``."""
        return self._asdict()


def interval_of_mean(values: Tensor) -> tuple[float, float]:
    """Returns the bootstrap interval of the mean of values.

    Args:
        values: One number per sample, (n,).

    Example:
        >>> low, high = interval_of_mean(torch.tensor([0.0, 1.0]).repeat(50))
        >>> 0.35 < low < 0.5 < high < 0.65
        True
    """
    generator, values = torch.Generator().manual_seed(SEED), values.double()
    rounds = max(1, BLOCK // len(values))
    means = []
    for start in range(0, ROUNDS, rounds):
        chosen = torch.randint(len(values), (min(rounds, ROUNDS - start), len(values)), generator=generator)
        means.append(values[chosen].mean(1))
    tail = (1 - LEVEL) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def bootstrapped(values: Tensor) -> Estimate:
    """Returns the mean over prompts or images with a bootstrap interval.

    Args:
        values: One number per prompt or image, (n,).

    Example:
        >>> bootstrapped(torch.ones(4))
        Estimate(value=1.0, low=1.0, high=1.0)
    """
    return Estimate(float(values.double().mean()), *interval_of_mean(values))


def shifted(value: float, influences: Tensor) -> Estimate:
    """Returns a score that is not a mean over samples, with the bootstrap interval of its linear part.

    Args:
        value: The score.
        influences: n times the derivative of the score with respect to the weight of each of n samples, (n,), with
            mean 0.

    Example:
        >>> shifted(2.0, torch.zeros(4))
        Estimate(value=2.0, low=2.0, high=2.0)
    """
    low, high = interval_of_mean(influences)
    return Estimate(value, value + low, value + high)
