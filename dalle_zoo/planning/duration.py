"""Duration of an optimizer step on a given GPU and network."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_zoo.planning.collectives import collectives
from dalle_zoo.planning.formats import PRECISIONS
from dalle_zoo.planning.hardware import GPU
from dalle_zoo.planning.memory import Memory
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.workload import Workload

LINK_SHARE = 0.8
"""Share of a link's nominal rate that collectives are assumed to reach."""
MEMORY_SHARE = 0.7
"""Share of the memory's nominal bandwidth that the optimizer is assumed to reach."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates that training reaches, per second."""

    compute: float
    """Operations of a GPU in the precision of the branches."""
    float32: float
    """Operations of a GPU in float32."""
    memory: float
    """Bytes read or written in a GPU's memory."""
    intra: float
    """Bytes that a GPU sends inside its node."""
    inter: float
    """Bytes that a node sends to other nodes."""


def rates_of(gpu: GPU, setup: Setup, mfu: float, intra: float | None = None, inter: float | None = None) -> Rates:
    """Returns the rates of a GPU.

    Args:
        gpu: The GPU.
        setup: Determines the precision; a dtype that the GPU lacks runs at the rate of float32.
        mfu: Share of the peak rate that is reached while the GPU computes, in (0, 1].
        intra: Rate of collectives from one GPU inside a node, GB/s. Defaults to 80 % of the link.
        inter: Rate of collectives from one node to others, GB/s. Defaults to 80 % of the link.

    Raises:
        ValueError: A share or a rate is out of range.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be in (0, 1], got {mfu}: 0.4 is what large transformers reach")
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
    """Returns the dtype of the products in the branches."""
    return "float16" if setup.paper_formats else PRECISIONS[setup.precision]


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of one optimizer step by part. In both passes, communication overlaps computation."""

    forward: float
    backward: float
    """Includes recomputation."""
    forward_network: float
    backward_network: float
    exchange: float
    """Communication after the backward pass."""
    powersgd: float
    """Computation of PowerSGD."""
    optimizer: float

    @property
    def waiting(self) -> float:
        """Time of communication that does not overlap computation."""
        hidden = max(self.forward_network - self.forward, 0) + max(self.backward_network - self.backward, 0)
        return hidden + self.exchange

    @property
    def total(self) -> float:
        """Time of the step."""
        return self.forward + self.backward + self.waiting + self.powersgd + self.optimizer


def duration_of(work: Workload, setup: Setup, memory: Memory, rates: Rates, compress: bool = True) -> Duration:
    """Estimates the duration of one optimizer step.

    Args:
        work: The stage.
        setup: Training setup.
        memory: Memory of the stage, which the optimizer reads and writes.
        rates: Rates of the hardware.
        compress: False for the same strategy without PowerSGD. Defaults to True.
    """
    flops = work.flops
    samples = setup.batch * setup.accumulate
    forward = sum(flops.forward.values())
    backward = flops.backward + (flops.recomputed if setup.recompute else 0.0)
    network = {"forward": 0.0, "backward": 0.0, "after": 0.0}
    for c in collectives(work, setup, compress):  # all GPUs of a node share its network
        network[c.when] += c.intra / rates.intra + c.inter * setup.devices / rates.inter
    factors = setup.sharding.factors(work.parameters) if compress else None
    held = memory.held
    updated = held["weights"] * sum(p.total for p in work.trained) / sum(p.total for p in work.parameters)
    moments = held["AdamW moments"] + held.get("Muon momentum", 0.0)
    touched = 2 * (updated + moments) + held["gradients"]
    orthogonalization = setup.muon_iterations * _iteration(work) / setup.world  # the ranks share the matrices
    return Duration(
        forward=(forward + flops.early) * samples / rates.compute,
        backward=(backward - flops.early) * samples / rates.compute,
        forward_network=network["forward"],
        backward_network=network["backward"],
        exchange=network["after"],
        powersgd=factors.flops / rates.float32 if factors else 0.0,
        optimizer=touched / rates.memory + orthogonalization / rates.compute,
    )


def _iteration(work: Workload) -> float:
    """Operations of an iteration of Muon: three products with every matrix, the short side first."""
    sides = ((min(p.shape), max(p.shape), p.count) for p in work.trained if p.low_rank)
    return sum(2.0 * count * (2 * short**2 * long + short**3) for short, long, count in sides)
