"""The training setup: the keys of a recipe that determine memory, traffic and time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dalle_zoo.planning.formats import FLOAT32, PAPER, Formats, formats_of
from dalle_zoo.planning.strategies import Sharding, sharding_of
from dalle_zoo.values import check_integers


@dataclass(frozen=True, kw_only=True)
class Setup:
    """GPUs, strategy, precision and batch."""

    devices: int
    """GPUs per node."""
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    moments: str = "float32"
    """Format of AdamW's moments."""
    clips_variance: bool = False
    """Whether AdamW clips its second moment."""
    muon_iterations: int = 0
    """Iterations of Muon, which updates the matrices of the residual branches; 0 if AdamW updates them."""
    on_cpu: bool = False
    """Whether the recipe trains on the CPU, where every device is a process."""
    batch: int = 8
    """Samples per GPU and forward pass."""
    accumulate: int = 1
    """Forward and backward passes per optimizer step."""
    recompute: bool = False
    """Whether residual blocks are recomputed in the backward pass."""
    average: Literal["none", "gpu", "host"] = "none"
    """Memory that stores the averaged weights."""
    steps: int | None = None
    """Optimizer steps of the run."""
    paper_formats: bool = False
    """Whether numbers are stored as in the paper, rather than as in this package."""

    def __post_init__(self) -> None:
        check_integers(self, "devices", "nodes", "batch", "accumulate")
        _ = self.sharding, self.formats  # unknown names raise here

    @property
    def world(self) -> int:
        """Number of GPUs."""
        return self.devices * self.nodes

    @property
    def samples(self) -> int:
        """Samples per optimizer step."""
        return self.world * self.batch * self.accumulate

    @cached_property
    def sharding(self) -> Sharding:
        """Shards and replicas of the network."""
        return sharding_of(self.strategy, self.devices, self.nodes)

    @cached_property
    def formats(self) -> Formats:
        """Bytes per number."""
        return PAPER if self.paper_formats else formats_of(self.precision, self.moments)

    @property
    def gathers(self) -> bool:
        """Whether weights are sharded, and gathered for use."""
        return self.sharding.shards.size > 1

    @property
    def reduced(self) -> float:
        """Bytes of a number of a sharded gradient in collectives."""
        return self.formats.compute if self.paper_formats else FLOAT32

    @property
    def wire(self) -> float:
        """Bytes of a number of PowerSGD's factors in collectives."""
        return self.formats.factor if self.paper_formats else self.sharding.wire_bits / 8

    @property
    def buckets(self) -> bool:
        """Whether gradients are copied into buckets that are averaged in the backward pass."""
        return self.world > 1 and self.sharding.name == "ddp"
