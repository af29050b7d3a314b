"""Kernel distance: with Inception's features, the KID."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# n samples, m of them in a subset, d features


def kernel_distance(
    a: Tensor, b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``, unbiased, over random subsets.

    Values slightly below 0 are right where both sides are alike. The subsets are those that torch-fidelity samples: by
    NumPy's ``RandomState(seed)``, without replacement, of ``a`` and ``b`` by turns. It computes in float32, this in
    float64.

    Reference: Demystifying MMD GANs (Binkowski et al., 2018).

    Args:
        a: (n_a, d).
        b: (n_b, d).
        subsets: Repetitions.
        subset_size: m, at most the samples of a side and at least 2.
        seed: Seed of the subsets.

    Returns:
        Mean and standard deviation (divided by ``subsets``) over the subsets.

    Raises:
        ValueError: Fewer samples than a subset needs, or features of different lengths.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (n, d) with one d, got {tuple(a.shape)} and {tuple(b.shape)}")
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"subset_size must lie in 2..{min(len(a), len(b))} (the smaller side), got {subset_size}")
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x, y = (side[torch.from_numpy(random.choice(len(side), subset_size, replace=False))] for side in (a, b))
        values.append(_discrepancy(x.double(), y.double()))
    found = torch.stack(values)
    return float(found.mean()), float(found.std(correction=0))


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    m = len(x)
    within = [_kernel(side, side) for side in (x, y)]
    pairs = sum((k.sum() - k.trace()) / (m * (m - 1)) for k in within)
    return pairs - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.t() / x.shape[1] + 1) ** 3
