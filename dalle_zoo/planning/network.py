"""Bytes that a GPU sends in one step, and how long that takes.

Every collective operation is counted as the ring algorithm sends it, in two levels: between nodes each GPU moves its
share of the data, inside a node the GPUs exchange the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dalle_zoo.planning.formats import FLOAT32
from dalle_zoo.planning.parameters import ROOT, held, unit_sizes
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import Group, factors_of
from dalle_zoo.planning.work import Work

When = Literal["forward", "backward", "after"]


@dataclass(frozen=True)
class Collective:
    """One kind of collective operation of a step."""

    name: str
    when: When
    """Passes hide operations behind their arithmetic; what comes after them is waited for."""
    group: Group
    elements: float
    """Numbers that one GPU ends or begins with, over all blocks and all passes of the step."""
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


def collectives(work: Work, setup: Setup, compress: bool = True) -> list[Collective]:
    """Collective operations of one step.

    Args:
        work: What the stage asks for.
        setup: How it is trained.
        compress: False asks for the same strategy without PowerSGD.
    """
    spread, f = setup.spread, setup.formats
    found = _sharding(work, setup) if setup.gathers else []
    shard = held(work.parameters, spread.shards.size)
    if spread.copies.size > 1:
        passes = setup.accumulate if setup.gathers else 1  # ddp waits for the last pass of a step
        if spread.rank is not None and compress:
            factors = factors_of(work.parameters, spread.shards.size, spread.rank)
            thin = factors.left + factors.right
            found.append(Collective("all-reduce of P and R", "after", spread.copies, thin, setup.wire, 2))
            found.append(
                Collective("all-reduce of the rest", "after", spread.copies, factors.uncompressed, FLOAT32, 2)
            )
        else:
            width = setup.reduced if setup.gathers else f.matrix
            found.append(Collective("all-reduce of gradients", "backward", spread.copies, passes * shard, width, 2))
    return found


def _sharding(work: Work, setup: Setup) -> list[Collective]:
    """Gathering of weights and scattering of gradients, in every pass of a step."""
    spread, f, passes = setup.spread, setup.formats, setup.accumulate
    root = unit_sizes(work.parameters)[ROOT]
    blocks = held(work.parameters) - root
    gather, scatter = "all-gather of weights", "reduce-scatter of gradients"
    return [
        Collective(f"{gather}, forward", "forward", spread.shards, passes * blocks, f.compute),
        Collective(f"{gather} outside the blocks", "forward", spread.shards, passes * root, f.other),
        Collective(f"{gather}, backward", "backward", spread.shards, passes * blocks, f.compute),
        Collective(scatter, "backward", spread.shards, passes * (blocks + root), setup.reduced),
    ]
