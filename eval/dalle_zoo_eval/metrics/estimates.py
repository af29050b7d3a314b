"""Scores with bootstrap intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 1000
"""Rounds of the bootstrap: the ends of a 95 % interval then vary by some 2 % of its width."""
LEVEL = 0.95
"""Share of repetitions within an interval."""
SEED = 0
"""Seed of the bootstrap, and of the order of smaller sets."""


class Estimate(NamedTuple):
    """A part of a score with its own interval."""

    value: float
    """The score."""
    low: float
    """Lower end of the bootstrap interval."""
    high: float
    """Upper end."""


def bootstrapped(values: Tensor) -> Estimate:
    """Mean over prompts, and the interval of the means of resampled prompts.

    Args:
        values: One number per prompt, (B,).

    Example:
        >>> bootstrapped(torch.ones(4))
        Estimate(value=1.0, low=1.0, high=1.0)
    """
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randint(len(values), (ROUNDS, len(values)), generator=generator)
    means = values.double()[chosen].mean(1)
    tail = (1 - LEVEL) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(float(values.double().mean()), low, high)
