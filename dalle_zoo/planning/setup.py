"""How a stage is trained: the keys of a recipe that change what training takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dalle_zoo.planning.formats import FLOAT32, PAPER, Formats, formats_of
from dalle_zoo.planning.strategies import Spread, spread_of


@dataclass(frozen=True, kw_only=True)
class Setup:
    """GPUs, strategy, precision and batch."""

    devices: int
    """GPUs of a node."""
    nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    moments: str = "float32"
    """Form of AdamW's moments."""
    clips_variance: bool = False
    """Whether AdamW clips its second moment."""
    batch: int = 8
    """Samples of one GPU in one forward pass."""
    accumulate: int = 1
    """Forward and backward passes of a step."""
    recompute: bool = False
    """Whether the inside of a residual block is computed again in the backward pass."""
    average: Literal["none", "gpu", "host"] = "none"
    """Where the averaged weights lie."""
    steps: int | None = None
    """Steps of the run."""
    paper_formats: bool = False
    """Whether numbers are stored as the paper had them, not as this package does."""

    def __post_init__(self) -> None:
        for name in ("devices", "nodes", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _ = self.spread, self.formats  # a wrong name stops here

    @property
    def world(self) -> int:
        """All GPUs."""
        return self.devices * self.nodes

    @property
    def samples(self) -> int:
        """Samples of one step."""
        return self.world * self.batch * self.accumulate

    @cached_property
    def spread(self) -> Spread:
        """Who holds what."""
        return spread_of(self.strategy, self.devices, self.nodes)

    @cached_property
    def formats(self) -> Formats:
        """Bytes of a number of each kind."""
        return PAPER if self.paper_formats else formats_of(self.precision, self.moments)

    @property
    def gathers(self) -> bool:
        """Whether weights lie in shards and are gathered for use."""
        return self.spread.shards.size > 1

    @property
    def reduced(self) -> float:
        """Bytes of a sharded gradient on the wire."""
        return self.formats.compute if self.paper_formats else FLOAT32

    @property
    def wire(self) -> float:
        """Bytes of a number of PowerSGD's factors on the wire."""
        return self.formats.factor if self.paper_formats else self.spread.wire_bits / 8

    @property
    def buckets(self) -> bool:
        """Whether gradients are copied into buckets that are averaged in the backward pass."""
        return self.world > 1 and self.spread.name == "ddp"
