"""Parameters by shape, and how much of one a shard holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ROOT = "root"
"""Unit of all that lies outside the residual branches; it is gathered for all of a forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Parameters of one shape that are treated alike."""

    kind: str
    """What it is called in tables: "matrices", "text head"."""
    shape: tuple[int, ...]
    count: int = 1
    """How many there are in the complete network."""
    unit: str = ROOT
    """What is gathered together; branches of one name are units of equal size."""
    axis: int = 0
    """Axis that is split into shards."""
    compressed: int = 0
    """Matrices that PowerSGD sees in it: its rows are split into so many; 0 if it is sent as it is."""
    autocast: bool = False
    """Whether autocast makes a 16-bit copy of it."""
    early: bool = False
    """Whether its gradient is computed in the forward pass: complete, float32."""

    @property
    def total(self) -> int:
        """Elements of all of them."""
        return self.count * math.prod(self.shape)

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of the largest of so many shards."""
        shard_size = math.ceil(self.shape[self.axis] / shards)
        return (*self.shape[: self.axis], shard_size, *self.shape[self.axis + 1 :])

    def held(self, shards: int) -> int:
        """Elements on one GPU."""
        return self.count * math.prod(self.shard_shape(shards))

    def matrices(self, shards: int) -> list[tuple[int, int]]:
        """Rows and columns of every matrix that PowerSGD sees on one GPU, for one of the ``count``."""
        if not self.compressed:
            return []
        rows, columns = self.shard_shape(shards)
        return [(math.ceil(rows / self.compressed), columns)] * self.compressed


def held(parameters: Iterable[Parameter], shards: int = 1) -> int:
    """Elements on one GPU."""
    return sum(p.held(shards) for p in parameters)


def by_kind(parameters: Iterable[Parameter]) -> dict[str, int]:
    """Elements of every kind, in the order of their first mention."""
    kinds: dict[str, int] = {}
    for p in parameters:
        kinds[p.kind] = kinds.get(p.kind, 0) + p.total
    return kinds


def unit_sizes(parameters: Iterable[Parameter]) -> dict[str, int]:
    """Elements of one unit of every name; units of a branch are all of one size."""
    sizes: dict[str, int] = {}
    repeats: dict[str, int] = {}
    for p in parameters:
        sizes[p.unit] = sizes.get(p.unit, 0) + p.total
        repeats[p.unit] = p.count
    return {unit: size if unit == ROOT else size // repeats[unit] for unit, size in sizes.items()}
