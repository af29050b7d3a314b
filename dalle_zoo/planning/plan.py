"""The plan: all that training takes, in one place, and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from dalle_zoo.planning.checks import check
from dalle_zoo.planning.duration import Duration, Rates, duration_of, rates_of
from dalle_zoo.planning.hardware import GPU
from dalle_zoo.planning.memory import Memory, memory_of
from dalle_zoo.planning.network import Collective, collectives
from dalle_zoo.planning.parameters import by_kind
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import Factors, factors_of
from dalle_zoo.planning.suggestions import BFLOAT16, Suggestion, suggestions
from dalle_zoo.planning.work import Work


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What is known of the machines."""

    memory: float | None = None
    """Bytes of a GPU; without it, whether training fits is not checked."""
    gpu: GPU | None = None
    """No times without."""
    mfu: float
    """Share of the GPU's peak while it computes."""
    intra: float | None = None
    """GB/s of one GPU inside a node."""
    inter: float | None = None
    """GB/s of a node to others."""
    reserve: float | None = None
    """Bytes of a GPU that are not for tensors. Defaults to what the formats assume."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All answers."""

    work: Work
    setup: Setup
    hardware: Hardware
    memory: Memory
    other_recompute: Memory | None
    """The same with recomputation where there is none, and the other way round; None for a stage without."""
    suggestions: list[Suggestion]
    """What would make it fit; empty if it does."""
    wire: list[Collective]
    wire_uncompressed: list[Collective]
    """Without PowerSGD."""
    factors: Factors | None
    """Of PowerSGD."""
    rates: Rates | None
    duration: Duration | None
    duration_uncompressed: Duration | None
    """Without PowerSGD, where the strategy has it."""

    @property
    def fits(self) -> bool | None:
        """Whether it fits the GPU, None if that is not known."""
        return None if self.hardware.memory is None else self.memory.total <= self.hardware.memory

    @property
    def model_flops(self) -> float:
        """Operations of a step of all GPUs, without recomputation."""
        return self.work.flops().model * self.setup.samples

    @property
    def utilization(self) -> float | None:
        """Model operations by what the GPUs' peak would allow in the time of a step."""
        if self.duration is None or self.rates is None:
            return None
        peak = self.rates.compute / self.hardware.mfu
        return self.model_flops / (self.duration.total * peak * self.setup.world)


def make_plan(work: Work, setup: Setup, hardware: Hardware) -> Plan:
    """Works everything out.

    Raises:
        ValueError: A combination that does not train, or a number out of range.
    """
    check(work, setup)
    memory = memory_of(work, setup, hardware.reserve)
    other = None
    if work.recomputes:
        other = memory_of(work, _turned(setup), hardware.reserve)
    rates = duration = uncompressed = None
    if hardware.gpu is not None:
        rates = rates_of(hardware.gpu, setup, hardware.mfu, hardware.intra, hardware.inter)
        duration = duration_of(work, setup, memory, rates)
        uncompressed = (
            duration_of(work, setup, memory, rates, compress=False) if setup.spread.rank is not None else None
        )
    wanted: list[Suggestion] = []
    if hardware.memory is not None and memory.total > hardware.memory:
        lacks = setup.precision.startswith("16-")  # as who has bfloat16 would not choose
        if hardware.gpu is not None:
            lacks = "bfloat16" not in hardware.gpu.tflops
        wanted = suggestions(work, setup, hardware.memory, hardware.reserve, leave_out=(BFLOAT16,) if lacks else ())
    factors = None
    if setup.spread.rank is not None:
        factors = factors_of(work.parameters, setup.spread.shards.size, setup.spread.rank)
    return Plan(
        work=work,
        setup=setup,
        hardware=hardware,
        memory=memory,
        other_recompute=other,
        suggestions=wanted,
        wire=collectives(work, setup),
        wire_uncompressed=collectives(work, setup, compress=False),
        factors=factors,
        rates=rates,
        duration=duration,
        duration_uncompressed=uncompressed,
    )


def _turned(setup: Setup) -> Setup:
    return replace(setup, recompute=not setup.recompute)


def as_data(plan: Plan, recipe: str) -> dict[str, Any]:
    """The plan as JSON holds it: bytes, seconds, operations."""
    setup, hardware = plan.setup, plan.hardware
    data: dict[str, Any] = {
        "recipe": recipe,
        "stage": plan.work.stage,
        "setup": {
            **asdict(setup),
            "world": setup.world,
            "samples_per_step": setup.samples,
            "shards": setup.spread.shards.size,
            "copies": setup.spread.copies.size,
            "formats": asdict(setup.formats),
        },
        "hardware": asdict(hardware),
        "parameters": by_kind(plan.work.parameters),
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "fits": plan.fits,
        "suggestions": [asdict(suggestion) for suggestion in plan.suggestions],
        "operations_per_sample": asdict(plan.work.flops()),
        "model_operations_per_step": plan.model_flops,
        "tokens_per_step": setup.samples * plan.work.tokens,
        "wire_bytes": {
            "with_powersgd" if plan.factors else "sent": _wire(plan.wire),
            **({"without_powersgd": _wire(plan.wire_uncompressed)} if plan.factors else {}),
        },
        "powersgd": {**asdict(plan.factors), "compression": plan.factors.compression} if plan.factors else None,
        "step_seconds": {**asdict(plan.duration), "total": plan.duration.total} if plan.duration else None,
        "utilization": plan.utilization,
        "run_seconds": plan.duration.total * setup.steps if plan.duration and setup.steps else None,
    }
    return data


def _wire(found: list[Collective]) -> list[dict[str, Any]]:
    return [{"name": c.name, "when": c.when, "intra": c.intra, "inter": c.inter} for c in found]
