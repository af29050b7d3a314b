"""Distributed strategies, by name.

| name | weights | gradients of the copies |
|---|---|---|
| ``ddp`` | unsharded in every process | averaged during the backward pass |
| ``ddp_powersgd(rank=…)`` | unsharded | low-rank factors with error feedback |
| ``fsdp`` | sharded over all processes, as flat vectors (FSDP1) | no copies |
| ``fsdp2`` | sharded over all processes, parameter by parameter | no copies |
| ``hsdp`` | sharded in each machine, with a copy per machine | averaged |
| ``hsdp_powersgd(rank=…)`` | like ``hsdp``, as in the paper | low-rank factors with error feedback |
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
"""Example of a strategy with an option, for messages."""

STRATEGIES: Registry[Callable[..., Strategy]] = Registry("strategy", group="dalle_zoo.strategies")


@STRATEGIES.register("ddp")
def ddp() -> Strategy:
    """Data parallelism: every process has the unsharded network."""
    return DDPStrategy()


@STRATEGIES.register("fsdp2")
def fsdp2() -> Strategy:
    """Sharded over all processes."""
    return FullyShard()


@STRATEGIES.register("hsdp")
def hsdp(shard_size: int = 0) -> Strategy:
    """Sharded over groups of ``shard_size`` processes, each with a copy. Defaults to 0: the processes of a machine."""
    return FullyShard(shard_size)


STRATEGIES.register("fsdp")(FSDP1)
STRATEGIES.register("ddp_powersgd")(DDPPowerSGD)
STRATEGIES.register("hsdp_powersgd")(HSDPPowerSGD)


def defers_weights(spec: object) -> bool:
    """Whether a strategy, as recipes name it, shards a network before it has weights.

    Example:
        >>> [defers_weights(spec) for spec in ("ddp", "fsdp", "fsdp2", EXAMPLE)]
        [False, False, True, True]
    """
    name = parse_spec(spec, "strategy", EXAMPLE)[0] if isinstance(spec, str) else ""
    return name in STRATEGIES and hooks_of(make_strategy(str(spec))).defers_weights


def make_strategy(spec: str) -> Strategy:
    """Builds a strategy from ``name`` or ``name(option=integer, ...)``.

    Raises:
        UnknownNameError: The strategy is unknown; the message suggests the nearest name.
        ValueError: The text is not a spec, or an option is unknown, missing or out of range.

    Example:
        >>> type(make_strategy("fsdp2")).__name__
        'FullyShard'
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
