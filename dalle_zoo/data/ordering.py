"""The order of samples, as a pure function of (seed, epoch)."""

from __future__ import annotations

import itertools
from bisect import bisect_left
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

    def __len__(self) -> int:
        return self.stop - self.start


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


class Order(Iterator[int]):
    """Positions ``0 .. total - 1`` in their order or shuffled, of which the first can be left out.

    Positions are shuffled with a buffer: each is sampled from the next ``buffer_size`` ones, so that records which are
    read in their order wait in a buffer of that size.

    Args:
        total: Number of positions.
        seed: Seed of the shuffled order. Defaults to None, not shuffled.
        epoch: Number of the pass over the data. Defaults to 0.
        start: Position, in the epoch, of the first one. Defaults to 0.
        buffer_size: Size of the buffer. Defaults to 1.
        skip: Number of positions at the beginning of the order that are left out. Defaults to 0.
    """

    def __init__(
        self,
        total: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        start: int = 0,
        buffer_size: int = 1,
        skip: int = 0,
    ) -> None:
        self._total, self._size = total, 1 if seed is None else buffer_size
        self._rng = None if seed is None else seeded_rng("buffer", seed, epoch, start)
        self._buffer: list[int] = []
        self._next = 0
        if seed is None:
            self._next = min(skip, total)
        else:
            for _ in itertools.islice(self, skip):
                pass
        self._first, self._left = self._next, sorted(self._buffer)

    def __next__(self) -> int:
        while len(self._buffer) < self._size and self._next < self._total:
            self._buffer.append(self._next)
            self._next += 1
        if not self._buffer:
            raise StopIteration
        index = 0 if self._rng is None else self._rng.randrange(len(self._buffer))
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def wants(self, position: int) -> bool:
        """Returns whether a position was not left out."""
        return self.wants_any(position, position + 1)

    def wants_any(self, start: int, stop: int) -> bool:
        """Returns whether any of the positions ``start .. stop - 1`` was not left out."""
        return stop > self._first or bisect_left(self._left, start) < bisect_left(self._left, stop)


def in_order(order: Iterable[int], placed: Iterable[tuple[int | None, T]]) -> Iterator[T]:
    """Yields records in an order of their positions, and reads only as far as that needs.

    Args:
        order: Positions.
        placed: Records with their positions, all of those in ``order``; records without a position are passed on.
    """
    waiting: dict[int, T] = {}
    placed = iter(placed)
    for wanted in order:
        while wanted not in waiting:
            position, record = next(placed)
            if position is None:
                yield record
            else:
                waiting[position] = record
        yield waiting.pop(wanted)
    yield from (record for _, record in placed)
