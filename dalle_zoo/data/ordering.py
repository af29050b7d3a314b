"""The order of samples, as a pure function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from dalle_zoo.seeds import seeded_rng

T = TypeVar("T")


@dataclass(frozen=True)
class Stretch:
    """Samples ``start .. stop - 1`` of one shard."""

    shard: int
    start: int
    stop: int


def stretches(counts: Sequence[int], *, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Stretch]:
    """Finds the parts of shards at positions ``start .. stop - 1`` of an epoch.

    Dividing positions instead of shards gives every rank and worker the same number of samples for any number and
    sizes of shards; a shard on a boundary is read by both neighbors.

    Args:
        counts: Number of samples of each shard.
        seed: Seed of the order of shards; None for the given order.
        epoch: Number of the pass over the data.
        start: First position.
        stop: Position after the last.
    """
    order = list(range(len(counts)))
    if seed is not None:
        seeded_rng("shards", seed, epoch).shuffle(order)
    position = 0
    for shard in order:
        low, high = max(start - position, 0), min(stop - position, counts[shard])
        if low < high:
            yield Stretch(shard, low, high)
        position += counts[shard]


def shuffled(items: Iterable[T], buffer_size: int, *, seed: int | None, epoch: int, start: int) -> Iterator[T]:
    """Shuffles the items of a stretch with a buffer: each is sampled from the next ``buffer_size`` ones.

    Args:
        items: Items from position ``start`` on.
        buffer_size: Number of items in the buffer.
        seed: Seed of the order; None for the given order.
        epoch: Number of the pass over the data.
        start: Position of the first item.
    """
    if seed is None:
        yield from items
        return
    rng = seeded_rng("buffer", seed, epoch, start)
    buffer: list[T] = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= buffer_size:
            yield _take(buffer, rng)
    while buffer:
        yield _take(buffer, rng)


def _take(buffer: list[T], rng: Random) -> T:
    index = rng.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()
