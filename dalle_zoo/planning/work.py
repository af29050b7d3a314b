"""What a stage asks of a GPU, whatever the strategy: parameters, activations, operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from dalle_zoo.planning.formats import Formats
from dalle_zoo.planning.parameters import Parameter

Bytes = Mapping[str, float]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Flops:
    """Operations of one sample, a multiply-add counted as 2."""

    forward: Mapping[str, float]
    """Forward pass by part."""
    recomputed: float
    """Forward pass of what recomputation computes once more."""
    early: float = 0.0
    """Of the backward pass, what is computed in the forward one: gradients of heads while their logits are there."""

    @property
    def model(self) -> float:
        """Forward and backward pass; the backward one has two products for each of the forward one."""
        return 3 * sum(self.forward.values())


class Work(ABC):
    """Stage of training, on samples of a fixed size."""

    stage: str
    parameters: tuple[Parameter, ...]
    tokens: int
    """Positions of a sample."""
    recomputes: bool = False
    """Whether its residual blocks can be computed again in the backward pass."""

    @abstractmethod
    def retained(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """What the forward pass keeps for the backward pass."""

    @abstractmethod
    def at_step(self, batch: int, formats: Formats) -> Bytes:
        """What stands beside it at the end of the forward pass."""

    @abstractmethod
    def in_backward(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """What stands beside it for a moment of the backward pass, one at a time: the largest counts."""

    @abstractmethod
    def flops(self) -> Flops:
        """Operations of one sample."""
