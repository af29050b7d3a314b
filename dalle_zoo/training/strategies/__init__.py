"""How a network is spread over processes, by name.

| name | weights | gradients between copies |
|---|---|---|
| ``ddp`` | complete in every process | averaged while the backward pass runs |
| ``ddp_powersgd(rank=…)`` | complete | low-rank factors with error feedback |
| ``fsdp`` | sharded over all, as flat vectors (FSDP1) | no copies |
| ``fsdp2`` | sharded over all, every parameter by itself | no copies |
| ``hsdp`` | sharded inside a machine, copied between machines | averaged |
| ``hsdp_powersgd(rank=…)`` | as ``hsdp``: the paper's distribution | low-rank factors with error feedback |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from lightning.pytorch.strategies import DDPStrategy, Strategy

from dalle_zoo.registry import Registry, suggest
from dalle_zoo.specs import parse_spec
from dalle_zoo.training.strategies.fsdp1 import FSDP1
from dalle_zoo.training.strategies.fsdp2 import FullyShard
from dalle_zoo.training.strategies.powersgd import DDPPowerSGD, HSDPPowerSGD
from dalle_zoo.training.strategy_hooks import hooks_of

__all__ = [
    "EXAMPLE",
    "FSDP1",
    "STRATEGIES",
    "DDPPowerSGD",
    "FullyShard",
    "HSDPPowerSGD",
    "defers_weights",
    "make_strategy",
]

EXAMPLE = "hsdp_powersgd(rank=896)"
"""A strategy with an option, for messages."""

STRATEGIES: Registry[Callable[..., Strategy]] = Registry("strategy", group="dalle_zoo.strategies")


@STRATEGIES.register("ddp")
def ddp() -> Strategy:
    """Data parallel: every process holds the complete network."""
    return DDPStrategy()


@STRATEGIES.register("fsdp2")
def fsdp2() -> Strategy:
    """Sharded over all processes."""
    return FullyShard()


@STRATEGIES.register("hsdp")
def hsdp(shard_size: int = 0) -> Strategy:
    """Sharded over ``shard_size`` processes, those of one machine if 0; groups of them hold copies."""
    return FullyShard(shard_size)


STRATEGIES.register("fsdp")(FSDP1)
STRATEGIES.register("ddp_powersgd")(DDPPowerSGD)
STRATEGIES.register("hsdp_powersgd")(HSDPPowerSGD)


def defers_weights(spec: object) -> bool:
    """Whether a strategy, as recipes name it, shards a network before it has weights."""
    name = parse_spec(spec, "strategy", EXAMPLE)[0] if isinstance(spec, str) else ""
    return name in STRATEGIES and hooks_of(make_strategy(str(spec))).defers_weights


def make_strategy(spec: str) -> Strategy:
    """Builds a strategy from ``name`` or ``name(option=integer, ...)``.

    Raises:
        UnknownNameError: No such strategy, or no such option of it; names the nearest one.
        ValueError: The text is no spec, or an option is missing or out of range.
    """
    name, options = parse_spec(spec, "strategy", EXAMPLE)
    factory = STRATEGIES[name]
    parameters = inspect.signature(factory).parameters
    for option in options:
        if option not in parameters:
            raise ValueError(suggest(f"{name} option", option, parameters))
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in options]
    if missing:
        raise ValueError(f"strategy {name!r} needs {', '.join(missing)}: write '{name}({missing[0]}=...)'")
    return factory(**options)
