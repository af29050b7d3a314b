"""What would make a stage fit: small sets of changes, each of them checked."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dalle_zoo.planning.checks import check
from dalle_zoo.planning.memory import memory_of
from dalle_zoo.planning.setup import Setup
from dalle_zoo.planning.work import Work

NODE = 8
"""GPUs of a node that more GPUs come in."""
MOST_NODES = 128
"""As many as the paper had."""
LARGEST_SET = 4
"""Changes made together at most."""


@dataclass(frozen=True)
class Change:
    """A change of a recipe, as its keys and in words."""

    keys: str
    words: str
    cost: int
    """To order sets by: 1 costs little, 5 other hardware."""
    variants: Callable[[Work, Setup], Iterator[tuple[str, Setup]]]
    """Ways to make the change, the mildest first: text for the placeholder in ``keys``, and the setup."""


@dataclass(frozen=True)
class Suggestion:
    """Changes that make a stage fit together, and none of which can be left out."""

    keys: tuple[str, ...]
    """Overrides of the command line."""
    words: tuple[str, ...]
    total: float
    """Bytes on the GPU then."""


def _recompute(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    if work.recomputes and not s.recompute:
        yield "", replace(s, recompute=True)


def _average(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    if s.average == "gpu":
        yield "", replace(s, average="host")


def _shard(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    if s.gathers or s.devices == 1:
        return
    strategy = "hsdp" if s.nodes > 1 else "fsdp2"
    if s.spread.rank is not None:
        strategy = f"hsdp_powersgd(rank={max(round(s.spread.rank / s.devices), 1) * s.devices})"
    yield shlex.quote(strategy), replace(s, strategy=strategy)


def _shard_all(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    rank = None if s.spread.rank is None else s.spread.rank * s.spread.shards.size
    size = max(2 * s.devices, 2 * s.spread.shards.size)
    while size < s.world and s.world % size == 0:
        strategy = f"hsdp(shard_size={size})"
        if rank is not None:
            strategy = f"hsdp_powersgd(rank={max(round(rank / size), 1) * size},shard_size={size})"
        yield shlex.quote(strategy), replace(s, strategy=strategy)
        size *= 2
    if s.nodes > 1 and s.spread.shards.size < s.world:
        yield "fsdp2", replace(s, strategy="fsdp2")


def _uncompressed_gradients(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    if s.spread.rank is not None and not s.paper_formats:
        strategy = "hsdp" if s.gathers else "ddp"
        yield strategy, replace(s, strategy=strategy)


def _batch(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    for batch in range(s.batch - 1, 0, -1):
        if s.batch % batch == 0:
            passes = s.accumulate * s.batch // batch
            keys = f"{batch} --trainer.accumulate_grad_batches {passes}"
            yield keys, replace(s, batch=batch, accumulate=passes)


def _moments(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    if s.moments == "float32" and not s.paper_formats:
        yield "", replace(s, moments="8bit")


def _bfloat16(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    if s.precision != "bf16-true" and not s.paper_formats:
        yield "", replace(s, precision="bf16-true")


def _more(work: Work, s: Setup) -> Iterator[tuple[str, Setup]]:
    devices, nodes = s.devices, s.nodes
    while nodes * 2 <= MOST_NODES:
        devices, nodes = (devices * 2, nodes) if devices < NODE and nodes == 1 else (devices, nodes * 2)
        keys = f"{devices} --trainer.num_nodes {nodes} --trainer.strategy fsdp2"
        yield keys, replace(s, devices=devices, nodes=nodes, strategy="fsdp2")


BFLOAT16 = Change("--trainer.precision bf16-true", "weights, gradients and moments in bfloat16", 3, _bfloat16)
CHANGES = (
    Change("--model.init_args.recompute true", "recompute blocks in the backward pass", 1, _recompute),
    Change("WeightEMA of trainer.callbacks: device: cpu", "keep averaged weights in the node's memory", 1, _average),
    Change("--trainer.strategy {}", "shard over the GPUs of a node", 1, _shard),
    Change("--trainer.strategy {}", "gradients without PowerSGD and its buffers", 2, _uncompressed_gradients),
    Change("--data.init_args.batch_size {}", "smaller passes, as many samples per step", 2, _batch),
    Change("--model.init_args.adamw.moments 8bit", "moments of AdamW in 8 bits", 2, _moments),
    BFLOAT16,
    Change("--trainer.strategy {}", "shard over several nodes, so weights come from others", 3, _shard_all),
    Change("--trainer.devices {}", "shard over more GPUs", 5, _more),
)


def suggestions(
    work: Work,
    setup: Setup,
    limit: float,
    reserve: float | None = None,
    most: int = 5,
    leave_out: tuple[Change, ...] = (),
) -> list[Suggestion]:
    """Sets of changes with which the stage fits, the cheapest first.

    Args:
        work: What the stage asks for.
        setup: How it is to be trained.
        limit: Bytes of the GPU.
        reserve: Those that are not for tensors. Defaults to what the formats assume.
        most: Sets to return.
        leave_out: Changes that the machines do not allow.
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


def _variants(work: Work, setup: Setup, changes: tuple[Change, ...]) -> Iterator[tuple[tuple[str, ...], Setup]]:
    """All ways to make changes one after the other; nothing if one of them has no effect."""
    if not changes:
        yield (), setup
        return
    first, *rest = changes
    for text, changed in first.variants(work, setup):
        for keys, last in _variants(work, changed, tuple(rest)):
            yield (first.keys.format(text), *keys), last


def _trains(work: Work, setup: Setup) -> bool:
    try:
        check(work, setup)
    except ValueError:
        return False
    return True
