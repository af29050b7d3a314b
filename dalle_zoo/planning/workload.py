"""Requirements of a training stage under any strategy: parameters, activations, operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

from torch import nn

from dalle_zoo.planning.formats import Formats
from dalle_zoo.planning.parameters import Parameter
from dalle_zoo.planning.setup import Setup

Bytes = Mapping[str, float]
"""Bytes by purpose."""


class Layer(NamedTuple):
    """A linear layer, a convolution or a pooling in the forward pass of one sample.

    The sizes follow from the weight, which need not have storage: a forward pass on the meta device, such as
    `torch.utils.flop_counter` needs, imports PyTorch's compiler for seconds. The tests compare the two.
    """

    inputs: int
    """Elements of its input."""
    outputs: int
    """Elements of its output."""
    flops: int
    """Floating-point operations, without the addition of a bias; a multiply-add counts 2."""

    @classmethod
    def of(cls, module: nn.Linear | nn.Conv2d, positions: int) -> Layer:
        """Returns the sizes of a layer that computes ``positions`` outputs."""
        outputs, inputs = module.weight.shape[:2]
        return cls(inputs * positions, outputs * positions, 2 * module.weight.numel() * positions)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sample; a multiply-add counts 2."""

    forward: Mapping[str, float]
    """Forward pass by part."""
    recomputed: float
    """Forward pass of the parts that recomputation computes again."""
    early: float = 0.0
    """Part of the backward pass that the forward pass computes: gradients of the heads, next to their logits."""
    frozen: float = 0.0
    """Products of the forward pass with weights that are not trained, which need no gradient."""

    @property
    def backward(self) -> float:
        """Backward pass: two products for each product of the forward pass, one if the weight is not trained."""
        return 2 * sum(self.forward.values()) - self.frozen

    @property
    def model(self) -> float:
        """Forward and backward pass."""
        return sum(self.forward.values()) + self.backward


class Workload(ABC):
    """A training stage on samples of a fixed size."""

    stage: ClassVar[str]
    """Name of the stage in `dalle_zoo.training.STAGES`."""
    module: ClassVar[str]
    """Name of the stage's LightningModule in recipes; importing the class would load Lightning."""
    config_class: ClassVar[type]
    """Config of the network."""
    recomputes: ClassVar[bool] = False
    """Whether its residual blocks can be recomputed in the backward pass."""
    clips_variance: ClassVar[bool] = False
    """Whether AdamW clips its second moment by default."""
    parameters: tuple[Parameter, ...]
    counts: Mapping[str, int]
    """Number of parameters by part of the network."""
    tokens: int
    """Positions of a sample."""
    flops: Flops

    @cached_property
    def trained(self) -> tuple[Parameter, ...]:
        """Parameters with gradients."""
        return tuple(p for p in self.parameters if p.trained)

    @abstractmethod
    def retained(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Tensors that the forward pass retains for the backward pass."""

    @abstractmethod
    def at_loss(self, batch: int, formats: Formats) -> Bytes:
        """Further tensors that exist at the end of the forward pass."""

    @abstractmethod
    def in_backward(self, batch: int, formats: Formats, recompute: bool) -> Bytes:
        """Further tensors of the backward pass, one entry at a time: the largest counts."""

    def check(self, setup: Setup) -> None:
        """Raises `ValueError` for a combination that would fail when training begins."""
        name, rank = setup.sharding.name, setup.sharding.rank
        if not self.recomputes:
            if name != "ddp":
                raise ValueError(f"the {self.stage} has no blocks to shard, as {name} requires: use strategy ddp")
            if setup.recompute or setup.precision == "16-resblock":
                raise ValueError(
                    f"the {self.stage} has no blocks to recompute or to scale: leave recompute and 16-resblock out"
                )
        if setup.precision == "16-mixed" and rank is not None:
            raise ValueError("16-mixed skips steps process by process: use 16-resblock or bf16-mixed with PowerSGD")
        if setup.precision == "16-resblock" and name == "fsdp":
            raise ValueError("16-resblock does not work with fsdp: use fsdp2")
        if len(self.trained) < len(self.parameters) and (name != "ddp" or setup.precision == "16-resblock"):
            raise ValueError("model.tune trains in complete networks: use strategy auto or ddp, and no 16-resblock")
        if setup.muon_iterations and not self.recomputes:
            raise ValueError(f"the {self.stage} has no residual blocks of matrices: leave model.muon out")
        if setup.muon_iterations and (setup.gathers or setup.moments != "float32"):
            what = "complete matrices: use strategy ddp or ddp_powersgd" if setup.gathers else "float32 moments"
            raise ValueError(f"Muon needs {what}, or leave model.muon out")
        setup.sharding.factors(self.parameters)  # raises for a rank that compresses nothing
