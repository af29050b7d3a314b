"""Suggestions for a stage that does not fit into memory: small sets of changes, each checked by an estimate."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from dalle_zoo.planning.memory import memory_of
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.workload import Workload

NODE = 8
"""GPUs per node of suggested hardware."""
MAX_NODES = 128
"""Largest suggested number of nodes: that of the paper."""
LARGEST_SET = 4
"""Maximum number of changes in a suggestion."""


Variants = Callable[[Workload, Setup], Iterator[tuple[str, Setup]]]


@dataclass(frozen=True)
class Change:
    """A change of a recipe."""

    keys: str
    """Overrides of the command line, with a placeholder."""
    words: str
    """Description."""
    cost: int
    """Determines the order of suggestions: 1 costs little, 5 requires other hardware."""
    variants: Variants
    """Yields the variants of the change, the smallest first: text of the placeholder, and the changed setup."""


@dataclass(frozen=True)
class Suggestion:
    """Changes that together make a stage fit; none of them can be omitted."""

    keys: tuple[str, ...]
    """Overrides of the command line."""
    words: tuple[str, ...]
    total: float
    """Bytes of the GPU after the changes."""


def _set(applies: Callable[[Workload, Setup], bool], **fields: Any) -> Variants:
    """A change with one variant, which sets fields of the setup."""

    def variants(work: Workload, s: Setup) -> Iterator[tuple[str, Setup]]:
        if applies(work, s):
            yield "", replace(s, **fields)

    return variants


def _shard(work: Workload, s: Setup) -> Iterator[tuple[str, Setup]]:
    if s.gathers or s.devices == 1:
        return
    strategy = "hsdp" if s.nodes > 1 else "fsdp2"
    if s.sharding.rank is not None:
        strategy = f"hsdp_powersgd(rank={max(round(s.sharding.rank / s.devices), 1) * s.devices})"
    yield shlex.quote(strategy), replace(s, strategy=strategy)


def _shard_all(work: Workload, s: Setup) -> Iterator[tuple[str, Setup]]:
    rank = None if s.sharding.rank is None else s.sharding.rank * s.sharding.shards.size
    size = max(2 * s.devices, 2 * s.sharding.shards.size)
    while size < s.world and s.world % size == 0:
        strategy = f"hsdp(shard_size={size})"
        if rank is not None:
            strategy = f"hsdp_powersgd(rank={max(round(rank / size), 1) * size},shard_size={size})"
        yield shlex.quote(strategy), replace(s, strategy=strategy)
        size *= 2
    if s.nodes > 1 and s.sharding.shards.size < s.world:
        yield "fsdp2", replace(s, strategy="fsdp2")


def _uncompressed_gradients(work: Workload, s: Setup) -> Iterator[tuple[str, Setup]]:
    if s.sharding.rank is not None and not s.paper_formats:
        strategy = "hsdp" if s.gathers else "ddp"
        yield strategy, replace(s, strategy=strategy)


def _batch(work: Workload, s: Setup) -> Iterator[tuple[str, Setup]]:
    for parts in _divisors(s.batch):
        batch, passes = s.batch // parts, s.accumulate * parts
        yield f"{batch} --trainer.accumulate_grad_batches {passes}", replace(s, batch=batch, accumulate=passes)


@cache
def _divisors(number: int) -> list[int]:
    """Divisors above 1 in rising order, found in the square root of the number's size."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)} - {1})


def _more(work: Workload, s: Setup) -> Iterator[tuple[str, Setup]]:
    devices, nodes = s.devices, s.nodes
    while nodes * 2 <= MAX_NODES:
        devices, nodes = (devices * 2, nodes) if devices < NODE and nodes == 1 else (devices, nodes * 2)
        keys = f"{devices} --trainer.num_nodes {nodes} --trainer.strategy fsdp2"
        yield keys, replace(s, devices=devices, nodes=nodes, strategy="fsdp2")


_recompute = _set(lambda work, s: work.recomputes and not s.recompute, recompute=True)
_average = _set(lambda work, s: s.average == "gpu", average="host")
_moments = _set(lambda work, s: s.moments == "float32" and not s.paper_formats, moments="8bit")
_bfloat16 = _set(lambda work, s: s.precision != "bf16-true" and not s.paper_formats, precision="bf16-true")

BFLOAT16 = Change("--trainer.precision bf16-true", "weights, gradients and moments in bfloat16", 3, _bfloat16)
CHANGES = (
    Change("--model.init_args.recompute true", "recompute blocks in the backward pass", 1, _recompute),
    Change("WeightEMA of trainer.callbacks: device: cpu", "store averaged weights in the node's memory", 1, _average),
    Change("--trainer.strategy {}", "shard over the GPUs of a node", 1, _shard),
    Change("--trainer.strategy {}", "gradients without PowerSGD and its buffers", 2, _uncompressed_gradients),
    Change("--data.init_args.batch_size {}", "smaller passes, the same number of samples per step", 2, _batch),
    Change("--model.init_args.adamw.moments 8bit", "moments of AdamW in 8 bits", 2, _moments),
    BFLOAT16,
    Change("--trainer.strategy {}", "shard over several nodes", 3, _shard_all),
    Change("--trainer.devices {}", "shard over more GPUs", 5, _more),
)


def suggestions(
    work: Workload,
    setup: Setup,
    limit: float,
    reserve: float | None = None,
    most: int = 5,
    leave_out: tuple[Change, ...] = (),
) -> list[Suggestion]:
    """Returns sets of changes with which the stage fits, the cheapest first.

    Args:
        work: The stage.
        setup: Training setup.
        limit: Bytes of the GPU.
        reserve: Bytes that are not available to tensors. Defaults to the value of the formats.
        most: Maximum number of suggestions. Defaults to 5.
        leave_out: Changes that the hardware does not allow. Defaults to none.
    """
    found: list[tuple[tuple[Change, ...], Suggestion]] = []
    offered = [change for change in CHANGES if change not in leave_out]
    sets = [s for size in range(1, LARGEST_SET + 1) for s in itertools.combinations(offered, size)]
    for changes in sorted(sets, key=lambda s: (sum(change.cost for change in s), len(s))):
        if any(set(smaller) <= set(changes) for smaller, _ in found):
            continue
        for keys, changed in _variants(work, setup, changes):
            total = memory_of(work, changed, reserve).total if _trains(work, changed) else math.inf
            if total <= limit:
                found.append((changes, Suggestion(keys, tuple(change.words for change in changes), total)))
                break
        if len(found) == most:
            break
    return [suggestion for _, suggestion in found]


def _variants(work: Workload, setup: Setup, changes: tuple[Change, ...]) -> Iterator[tuple[tuple[str, ...], Setup]]:
    """Yields all combinations of the variants of changes; none if one of the changes has no effect."""
    if not changes:
        yield (), setup
        return
    first, *rest = changes
    for text, changed in first.variants(work, setup):
        for keys, last in _variants(work, changed, tuple(rest)):
            yield (first.keys.format(text), *keys), last


def _trains(work: Workload, setup: Setup) -> bool:
    try:
        work.check(setup)
    except ValueError:
        return False
    return True
