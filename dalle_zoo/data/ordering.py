"""The order of samples, as a pure function of (seed, epoch)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    """Parts of shards that hold positions ``start .. stop - 1`` of an epoch.

    Windows over positions rather than complete shards give every rank and worker the same number of
    samples, whatever the number and the sizes of the shards; a shard on a border is read by both
    neighbors.

    Args:
        counts: Samples of each shard.
        seed: Seed of the order of shards; None keeps it.
        epoch: Pass over the data.
        start: First position.
        stop: One past the last position.
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


def shuffled(items: Iterable[T], buffer_size: int, rng: random.Random) -> Iterator[T]:
    """Bounded shuffle: each item is sampled from a buffer of the next ``buffer_size`` ones."""
    buffer: list[T] = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= buffer_size:
            yield _take(buffer, rng)
    while buffer:
        yield _take(buffer, rng)


def _take(buffer: list[T], rng: random.Random) -> T:
    index = rng.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()
