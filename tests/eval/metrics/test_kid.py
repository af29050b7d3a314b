"""Kernel distance, compared with an explicit sum over pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dalle_zoo_eval.metrics.kid import kernel_distance
from torch import Tensor


def by_hand(x: Tensor, y: Tensor) -> float:
    def k(u: Tensor, v: Tensor) -> float:
        return (float(u @ v) / len(u) + 1) ** 3

    m = len(x)
    pairs = [(i, j) for i in range(m) for j in range(m)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (m * (m - 1))
    return within - 2 * sum(k(x[i], y[j]) for i, j in pairs) / m**2


def sides(n: int = 30, d: int = 3, shift: float = 0.5) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=random).double(), torch.randn(n + 5, d, generator=random).double() + shift


def test_value_equals_sum_over_pairs() -> None:
    a, b = sides()
    random = np.random.RandomState(7)
    values = []
    for _ in range(4):
        x = a[torch.from_numpy(random.choice(30, 6, replace=False))]
        y = b[torch.from_numpy(random.choice(35, 6, replace=False))]
        values.append(by_hand(x, y))
    got = kernel_distance(a, b, subsets=4, subset_size=6, seed=7)
    assert got == (pytest.approx(np.mean(values), rel=1e-10), pytest.approx(np.std(values), rel=1e-10))


def test_estimate_is_unbiased() -> None:
    """For equal distributions, the estimate is about 0 for any subset size; for different ones, it is larger."""
    same, deviation = kernel_distance(*sides(2000, shift=0), subsets=200, subset_size=20)
    assert abs(same) < 3 * deviation / 200**0.5
    apart, _ = kernel_distance(*sides(2000, shift=1), subsets=20, subset_size=20)
    assert apart > 10 * abs(same)


def test_wrong_input_raises() -> None:
    a, b = sides()
    with pytest.raises(ValueError, match="subsets of 31 need as many samples, got 30"):
        kernel_distance(a, b, subset_size=31)
    with pytest.raises(ValueError, match="one d"):
        kernel_distance(a, b[:, :2], subset_size=5)
    with pytest.raises(ValueError, match="subset_size must be at least 2 and subsets 1"):
        kernel_distance(a, b, subset_size=5, subsets=0)
