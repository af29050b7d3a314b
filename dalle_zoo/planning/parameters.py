"""Parameters of a network by shape, and the size of their shards."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dalle_zoo.models.residual import num_low_rank_matrices, shard_axis

ROOT = "root"
"""Unit of all parameters outside the residual branches; it stays gathered for a complete forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter, or those of the same name in all layers."""

    name: str
    """Name in the network; in layers, the name in the first."""
    shape: tuple[int, ...]
    count: int = 1
    """Number of layers with such a parameter."""
    unit: str = ROOT
    """Name of the unit whose parameters are gathered together; units of the same name have equal size."""
    autocast: bool = False
    """Whether autocast makes a 16-bit copy of it."""
    early: bool = False
    """Whether the forward pass computes its gradient, unsharded and in float32."""
    trained: bool = True
    """Whether it has a gradient, moments and an average. Otherwise it is only stored."""

    @property
    def low_rank(self) -> bool:
        """Whether PowerSGD may compress its gradient: matrices of residual branches."""
        return self.unit != ROOT and len(self.shape) == 2

    @property
    def total(self) -> int:
        """Elements in all layers."""
        return self.count * math.prod(self.shape)

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        """Shape of the largest shard."""
        axis = shard_axis(self.name, self.shape, shards)
        return (*self.shape[:axis], math.ceil(self.shape[axis] / shards), *self.shape[axis + 1 :])

    def held(self, shards: int) -> int:
        """Elements on one GPU."""
        return self.count * math.prod(self.shard_shape(shards))

    def matrices(self, shards: int) -> list[tuple[int, int]]:
        """Rows and columns of every matrix that PowerSGD compresses on one GPU in one layer."""
        if not self.low_rank:
            return []
        (rows, columns), parts = self.shard_shape(shards), num_low_rank_matrices(self.name)
        return [(math.ceil(rows / parts), columns)] * parts


def held(parameters: Iterable[Parameter], shards: int = 1) -> int:
    """Elements on one GPU."""
    return sum(p.held(shards) for p in parameters)


def unit_sizes(parameters: Iterable[Parameter]) -> dict[str, int]:
    """Elements of one unit, by the name of the unit."""
    sizes: dict[str, int] = {}
    for p in parameters:
        sizes[p.unit] = sizes.get(p.unit, 0) + (p.total if p.unit == ROOT else math.prod(p.shape))
    return sizes
