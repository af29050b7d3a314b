"""The plan: all estimates, and their conversion to JSON data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dalle_zoo.planning.collectives import Collective, collectives
from dalle_zoo.planning.duration import Duration, Rates, duration_of, rates_of
from dalle_zoo.planning.hardware import CPU, GPU
from dalle_zoo.planning.memory import Memory, memory_of
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import Factors
from dalle_zoo.planning.suggestions import BFLOAT16, Suggestion, suggestions
from dalle_zoo.planning.workload import Bytes, Workload


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """GPU and network; unknown values are None."""

    memory: float | None = None
    """Bytes of a GPU; None if unknown."""
    gpu: GPU | None = None
    """GPU for which times are estimated; None for no times."""
    mfu: float
    """Share of the GPU's peak while it computes."""
    intra: float | None = None
    """GB/s of one GPU inside a node."""
    inter: float | None = None
    """GB/s of a node to other nodes."""
    reserve: float | None = None
    """Bytes of a GPU that are not available to tensors. Defaults to the value of the formats."""


@dataclass(frozen=True)
class Plan:
    """All estimates, each computed when it is first read.

    Args:
        work: The stage.
        setup: Training setup.
        hardware: Hardware of the run.

    Raises:
        ValueError: Training would reject a combination of the setup.
    """

    work: Workload
    setup: Setup
    hardware: Hardware

    def __post_init__(self) -> None:
        self.work.check(self.setup)

    @cached_property
    def memory(self) -> Memory:
        """Memory of a GPU and of a node."""
        return memory_of(self.work, self.setup, self.hardware.reserve)

    @cached_property
    def other_recompute(self) -> Memory | None:
        """Memory with recomputation toggled; None for a stage that cannot recompute."""
        other = replace(self.setup, recompute=not self.setup.recompute)
        return memory_of(self.work, other, self.hardware.reserve) if self.work.recomputes else None

    @property
    def on_cpu(self) -> bool:
        """Whether it is planned for processes on a CPU: those of the recipe, unless a GPU or its memory is given."""
        gpu, memory = self.hardware.gpu, self.hardware.memory
        return gpu.name == CPU if gpu is not None else self.setup.on_cpu and memory is None

    @property
    def host(self) -> Bytes:
        """Memory of a node; on a CPU its processes hold what a GPU would."""
        host = self.memory.host
        return {**host, "processes": self.setup.devices * self.memory.total} if self.on_cpu else host

    @property
    def fits(self) -> bool | None:
        """Whether it fits the GPU; None if the GPU's memory is unknown."""
        return None if self.hardware.memory is None else self.memory.total <= self.hardware.memory

    @cached_property
    def suggestions(self) -> list[Suggestion]:
        """Changes that would make it fit; empty if it fits."""
        hardware, setup = self.hardware, self.setup
        if hardware.memory is None or self.fits:
            return []
        # If the GPU is unknown, a float16 precision suggests that it lacks bfloat16.
        lacks = "bfloat16" not in hardware.gpu.tflops if hardware.gpu else setup.precision.startswith("16-")
        leave_out = (BFLOAT16,) if lacks else ()
        return suggestions(self.work, setup, hardware.memory, hardware.reserve, leave_out=leave_out)

    @cached_property
    def factors(self) -> Factors | None:
        """Sizes of PowerSGD's factors; None for a strategy without it."""
        return self.setup.sharding.factors(self.work.parameters)

    def sent(self, compress: bool = True) -> list[Collective]:
        """Returns the collectives of a step; ``compress=False`` leaves PowerSGD out."""
        return collectives(self.work, self.setup, compress)

    @cached_property
    def rates(self) -> Rates | None:
        """Rates of the hardware; None without a GPU."""
        h = self.hardware
        return None if h.gpu is None else rates_of(h.gpu, self.setup, h.mfu, h.intra, h.inter)

    def duration(self, compress: bool = True) -> Duration | None:
        """Returns the duration of a step, None without a GPU; ``compress=False`` leaves PowerSGD out."""
        return None if self.rates is None else duration_of(self.work, self.setup, self.memory, self.rates, compress)

    @property
    def model_flops(self) -> float:
        """Operations of an optimizer step on all GPUs, without recomputation."""
        return self.work.flops.model * self.setup.samples

    @property
    def utilization(self) -> float | None:
        """Model FLOP utilization: model operations, divided by those of the GPUs' peak rate in the same time."""
        duration = self.duration()
        if duration is None or self.rates is None:
            return None
        peak = self.rates.compute / self.hardware.mfu
        return self.model_flops / (duration.total * peak * self.setup.world)


def as_data(plan: Plan, recipe: str) -> dict[str, Any]:
    """Returns the plan as JSON data, in bytes, seconds and operations."""
    setup, duration, factors = plan.setup, plan.duration(), plan.factors
    seconds = duration.total if duration else None
    return {
        "recipe": recipe,
        "stage": plan.work.stage,
        "setup": {
            **asdict(setup),
            "world": setup.world,
            "samples_per_step": setup.samples,
            "shards": setup.sharding.shards.size,
            "replicas": setup.sharding.replicas.size,
            "formats": asdict(setup.formats),
        },
        "hardware": asdict(plan.hardware),
        "parameters": dict(plan.work.counts),
        "memory_bytes": {**asdict(plan.memory), "host": dict(plan.host), "total": plan.memory.total},
        "fits": plan.fits,
        "suggestions": [asdict(suggestion) for suggestion in plan.suggestions],
        "operations_per_sample": asdict(plan.work.flops),
        "model_operations_per_step": plan.model_flops,
        "tokens_per_step": setup.samples * plan.work.tokens,
        "wire_bytes": {
            "with_powersgd" if factors else "sent": _bytes_sent(plan.sent()),
            **({"without_powersgd": _bytes_sent(plan.sent(compress=False))} if factors else {}),
        },
        "powersgd": {**asdict(factors), "compression": factors.compression} if factors else None,
        "step_seconds": {**asdict(duration), "total": seconds} if duration else None,
        "utilization": plan.utilization,
        "run_seconds": seconds * setup.steps if seconds and setup.steps else None,
    }


def _bytes_sent(found: list[Collective]) -> list[dict[str, Any]]:
    return [{"name": c.name, "when": c.when, "intra": c.intra, "inter": c.inter} for c in found]
