"""How long a step takes, on a named GPU and network."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_zoo.planning.formats import PRECISIONS
from dalle_zoo.planning.hardware import GPU
from dalle_zoo.planning.memory import Memory
from dalle_zoo.planning.network import Collective, collectives
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import factors_of
from dalle_zoo.planning.work import Work

LINK_SHARE = 0.8
"""Assumed share of a link's nominal rate that collective operations reach."""
MEMORY_SHARE = 0.7
"""Assumed share of the memory's nominal bandwidth that the optimizer reaches."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is reached of the hardware, per second."""

    compute: float
    """Operations of a GPU in the precision of the branches."""
    float32: float
    """Operations of a GPU in float32."""
    memory: float
    """Bytes of a GPU's memory."""
    intra: float
    """Bytes that a GPU sends inside its node."""
    inter: float
    """Bytes that a node sends to others."""


def rates_of(gpu: GPU, setup: Setup, mfu: float, intra: float | None = None, inter: float | None = None) -> Rates:
    """Rates of a GPU.

    Args:
        gpu: The GPU.
        setup: Whose precision decides; a type that the GPU lacks runs at the rate of float32.
        mfu: Share of the peak that is reached while the GPU computes, in (0, 1].
        intra: GB/s that collective operations reach from one GPU inside a node. Defaults to 80 % of the link.
        inter: GB/s that they reach from one node. Defaults to 80 % of the link.

    Raises:
        ValueError: A share or a rate out of range.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in (0, 1], got {mfu}: 0.4 is what large transformers reach")
    for name, rate in (("intra", intra), ("inter", inter)):
        if rate is not None and not rate > 0:
            raise ValueError(f"{name} must be above 0 GB/s, got {rate}")
    peak = gpu.tflops.get(computes_in(setup), gpu.tflops["float32"])
    return Rates(
        compute=peak * 1e12 * mfu,
        float32=gpu.tflops["float32"] * 1e12 * mfu,
        memory=gpu.bandwidth * 1e9 * MEMORY_SHARE,
        intra=1e9 * (LINK_SHARE * gpu.intra if intra is None else intra),
        inter=1e9 * (LINK_SHARE * gpu.inter if inter is None else inter),
    )


def computes_in(setup: Setup) -> str:
    """Type of the products in the branches."""
    return "float16" if setup.paper_formats else PRECISIONS[setup.precision]


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of one step by part. In forward and backward pass the network works behind the arithmetic."""

    forward: float
    backward: float
    """With recomputation."""
    forward_network: float
    backward_network: float
    exchange: float
    """Network behind the backward pass."""
    powersgd: float
    """Arithmetic of PowerSGD."""
    optimizer: float

    @property
    def waiting(self) -> float:
        """For the network."""
        hidden = max(self.forward_network - self.forward, 0) + max(self.backward_network - self.backward, 0)
        return hidden + self.exchange

    @property
    def total(self) -> float:
        """Of the step."""
        return self.forward + self.backward + self.waiting + self.powersgd + self.optimizer


def seconds_on_wire(collective: Collective, setup: Setup, rates: Rates) -> float:
    """Seconds of an operation; all GPUs of a node share its network."""
    return collective.intra / rates.intra + collective.inter * setup.devices / rates.inter


def duration_of(work: Work, setup: Setup, memory: Memory, rates: Rates, compress: bool = True) -> Duration:
    """Time of one step.

    Args:
        work: What the stage asks for.
        setup: How it is trained.
        memory: Its memory, which the optimizer passes through.
        rates: What is reached of the hardware.
        compress: False asks for the same strategy without PowerSGD.
    """
    flops = work.flops()
    samples = setup.batch * setup.accumulate
    forward = sum(flops.forward.values())
    backward = 2 * forward + (flops.recomputed if setup.recompute else 0.0)
    network = {"forward": 0.0, "backward": 0.0, "after": 0.0}
    for collective in collectives(work, setup, compress):
        network[collective.when] += seconds_on_wire(collective, setup, rates)
    spread, arithmetic = setup.spread, 0.0
    if spread.rank is not None and compress:
        arithmetic = factors_of(work.parameters, spread.shards.size, spread.rank).flops / rates.float32
    held = memory.held
    touched = 2 * (held["weights"] + held["AdamW moments"]) + held["gradients"]
    return Duration(
        forward=(forward + flops.early) * samples / rates.compute,
        backward=(backward - flops.early) * samples / rates.compute,
        forward_network=network["forward"],
        backward_network=network["backward"],
        exchange=network["after"],
        powersgd=arithmetic,
        optimizer=touched / rates.memory,
    )
