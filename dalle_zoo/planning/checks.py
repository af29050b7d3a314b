"""What a strategy refuses when training begins, said before."""

from __future__ import annotations

from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.strategies import factors_of
from dalle_zoo.planning.work import Work


def check(work: Work, setup: Setup) -> None:
    """Raises `ValueError` for a combination that does not train."""
    name = setup.spread.name
    if not work.recomputes:
        if name != "ddp":
            raise ValueError(f"the {work.stage} is not divided into blocks, as {name} needs it: use strategy ddp")
        if setup.recompute or setup.precision == "16-resblock":
            raise ValueError(
                f"the {work.stage} has no blocks to recompute or to scale: leave recompute and 16-resblock out"
            )
    if setup.precision == "16-mixed" and setup.spread.rank is not None:
        raise ValueError("16-mixed skips updates process by process: use 16-resblock or bf16-mixed with PowerSGD")
    if setup.precision == "16-resblock" and name == "fsdp":
        raise ValueError("16-resblock does not go with fsdp: use fsdp2")
    if setup.spread.rank is not None:
        factors_of(work.parameters, setup.spread.shards.size, setup.spread.rank)
