"""Bytes that a GPU sends in one optimizer step.

Every collective is counted as the ring algorithm sends it, in two levels: between nodes each GPU sends its share of
the data, inside a node the GPUs exchange the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_zoo.planning.formats import FLOAT32
from dalle_zoo.planning.parameters import ROOT, held, unit_sizes
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import Group
from dalle_zoo.planning.workload import Workload

When = Literal["forward", "backward", "after"]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in an optimizer step."""

    name: str
    when: When
    """Collectives of a pass overlap with its computation; those after the backward pass do not overlap."""
    group: Group
    elements: float
    """Numbers in the unsharded input or output of one GPU, over all blocks and all passes of the step."""
    width: float
    """Bytes of a number."""
    sweeps: int = 1
    """1 for a gather or a reduce-scatter, 2 for an all-reduce, which is both."""

    @property
    def intra(self) -> float:
        """Bytes that a GPU sends inside its node."""
        return self.sweeps * self.elements * self.width * (self.group.per_node - 1) / self.group.per_node

    @property
    def inter(self) -> float:
        """Bytes that a GPU sends to other nodes."""
        share = self.elements * self.width / self.group.per_node
        return self.sweeps * share * (self.group.nodes - 1) / self.group.nodes


def collectives(work: Workload, setup: Setup, compress: bool = True) -> list[Collective]:
    """Returns the collectives of one optimizer step.

    Args:
        work: The stage.
        setup: Training setup.
        compress: False for the same strategy without PowerSGD. Defaults to True.
    """
    sharding, f = setup.sharding, setup.formats
    found = _sharded(work, setup) if setup.gathers else []
    if sharding.replicas.size == 1:
        return found
    factors = sharding.factors(work.parameters) if compress else None
    if factors is not None:
        low_rank = factors.left + factors.right
        found.append(Collective("all-reduce of P and R", "after", sharding.replicas, low_rank, setup.wire, 2))
        rest = factors.uncompressed
        found.append(Collective("all-reduce of the rest", "after", sharding.replicas, rest, FLOAT32, 2))
    else:
        passes = setup.accumulate if setup.gathers else 1  # ddp reduces only in the last pass of a step
        gradients = passes * held(work.trained, sharding.shards.size)
        width = setup.reduced if setup.gathers else f.matrix
        found.append(Collective("all-reduce of gradients", "backward", sharding.replicas, gradients, width, 2))
    return found


def _sharded(work: Workload, setup: Setup) -> list[Collective]:
    """Gathers of weights and reduce-scatters of gradients, in every pass of a step."""
    shards, f, passes = setup.sharding.shards, setup.formats, setup.accumulate
    root = unit_sizes(work.parameters)[ROOT]
    blocks = held(work.parameters) - root
    gather, scatter = "all-gather of weights", "reduce-scatter of gradients"
    return [
        Collective(f"{gather}, forward", "forward", shards, passes * blocks, f.compute),
        Collective(f"{gather} outside the blocks", "forward", shards, passes * root, f.other),
        Collective(f"{gather}, backward", "backward", shards, passes * blocks, f.compute),
        Collective(scatter, "backward", shards, passes * (blocks + root), setup.reduced),
    ]
