"""Mean and covariance of features, as sums that are accumulated in chunks and combined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# n samples, d features

ROWS = 2000
"""Minimum number of samples added to moments at once: adding d x d numbers for every small part costs more."""


class StatisticsError(ValueError):
    """Statistics are missing or cannot be computed; the message states why."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Number, sum and sum of outer products of features, in float64.

    Sums of parts add up to the sums of all samples, so parts may come from any number of processes and have any size:
    results change by no more than the rounding of float64. Equal parts in equal order give equal bits.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 0.0]])
        >>> (Moments.of(features[:1]) + Moments.of(features[1:])).mean  # of parts, as of all
        tensor([2., 2.], dtype=torch.float64)
    """

    count: int
    """Number of samples n."""
    total: Tensor
    """Sum of the features, (d,)."""
    outer: Tensor
    """Sum of their outer products, (d, d)."""

    @classmethod
    def zero(cls, d: int) -> Self:
        """Returns the moments of no samples, with d features."""
        return cls(count=0, total=torch.zeros(d).double(), outer=torch.zeros(d, d).double())

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Returns the moments of features (n, d)."""
        return cls.zero(features.shape[1]).add(features)

    @classmethod
    def of_parts(cls, parts: Iterable[Tensor]) -> Self:
        """Returns the moments of features in one or more parts (n_i, d); memory does not grow with their number."""
        found: Self | None = None
        for (part,) in regrouped(zip(parts), ROWS):
            found = (cls.zero(part.shape[1]) if found is None else found).add(part)
        if found is None:
            raise StatisticsError("there are no features")
        return found

    @classmethod
    def exact(cls, mean: Tensor, covariance: Tensor, count: int) -> Self:
        """Returns the moments with a given mean (d,) and covariance (d, d, divided by n - 1)."""
        mean, covariance = mean.double(), covariance.double()
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise StatisticsError(f"expected (d,) and (d, d), got {tuple(mean.shape)} and {tuple(covariance.shape)}")
        return cls(count=count, total=mean * count, outer=covariance * (count - 1) + count * torch.outer(mean, mean))

    def add(self, features: Tensor) -> Self:
        """Returns the moments with further samples.

        Args:
            features: (n, d) of any float type, on any device that has float64.

        Raises:
            StatisticsError: The number of features differs, or a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise StatisticsError(f"features must be (n, {len(self.total)}), got {tuple(features.shape)}")
        x = features.double()
        if not bool(x.isfinite().all()):
            raise StatisticsError("features hold NaN or infinity: the network or its input is broken")
        return type(self)(
            count=self.count + len(x),
            total=self.total + x.sum(0).to(self.total.device),
            outer=self.outer + (x.t() @ x).to(self.outer.device),
        )

    def __sub__(self, other: Moments) -> Self:
        """Returns the moments without some of their samples."""
        return self + Moments(count=-other.count, total=-other.total, outer=-other.outer)

    def __add__(self, other: Moments) -> Self:
        if self.total.shape != other.total.shape:
            raise StatisticsError(f"moments of {len(self.total)} and of {len(other.total)} features cannot be added")
        return type(self)(
            count=self.count + other.count, total=self.total + other.total, outer=self.outer + other.outer
        )

    @property
    def mean(self) -> Tensor:
        """Mean, (d,)."""
        if self.count < 1:
            raise StatisticsError("there are no samples to take the mean of")
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance, divided by n - 1, (d, d).

        Raises:
            StatisticsError: Fewer than 2 samples.
        """
        if self.count < 2:
            raise StatisticsError(f"a covariance needs at least 2 samples, got {self.count}")
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few samples for a covariance of full rank (n <= d)."""
        return self.count <= len(self.total)


def regrouped(parts: Iterable[tuple[Tensor, ...]], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Yields the same rows in larger parts.

    Args:
        parts: Parts with one or more tensors each; the tensors of a part have equal numbers of rows.
        rows: Minimum number of rows of every part but the last; 0 leaves the parts unchanged.
    """
    waiting: list[tuple[Tensor, ...]] = []
    for part in parts:
        waiting.append(part)
        if sum(len(tensors[0]) for tensors in waiting) >= rows:
            yield tuple(torch.cat(column) for column in zip(*waiting, strict=True))
            waiting.clear()
    if waiting:
        yield tuple(torch.cat(column) for column in zip(*waiting, strict=True))


def in_batches(tensor: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yields parts of a tensor along its first axis, the last one shorter.

    Example:
        >>> [len(part) for part in in_batches(torch.zeros(5, 3), 2)]
        [2, 2, 1]
    """
    for start in range(0, len(tensor), batch_size):
        yield tensor[start : start + batch_size]


def above_rounding(values: Tensor) -> Tensor:
    """Returns which eigenvalues, smallest first, exceed the rounding of the largest one."""
    return values > len(values) * torch.finfo(torch.float64).eps * values[-1]
