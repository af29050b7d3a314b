"""A loader whose position can be saved: a run killed at any moment resumes with identical batches."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.data
from torch import Tensor

from dalle_zoo.data.checks import check_positive
from dalle_zoo.data.datasets import CaptionedDataset, Item, Record
from dalle_zoo.data.samples import Skipped

log = logging.getLogger(__name__)

# B batch, T text positions, H W image, h w code grid

Batch = dict[str, Any]
_Read = tuple[Batch, list[Skipped], int]
"""A batch, what was skipped before it, and the number of records that its lane has read."""
EncodeCaptions = Callable[[Sequence[str], Sequence[str], int], Tensor]
"""(captions, keys, epoch) to text ids, int64 (B, T)."""


@dataclass(frozen=True)
class Collate:
    """Collates items to a batch.

    A batch has ``key`` and ``caption`` (lists of str) and ``epoch`` (int); ``image``, float32 (B, 3, H, W) in [0, 1],
    or ``codes``, int64 (B, h, w), as the items have; ``text``, int64 (B, T), with ``encode_captions``; and for items
    with layers, ``layers`` and ``recolored``, lists of B tensors uint8 (L, 3, H, W) and int64 (L, 2), and ``cells``,
    int64 (B, h, w).

    Example:
        >>> item = {"key": "white", "caption": "a square", "image": torch.full((3, 8, 8), 255, dtype=torch.uint8)}
        >>> batch = Collate()([item, item], epoch=0)
        >>> batch["image"].shape, batch["image"].max(), batch["caption"]
        (torch.Size([2, 3, 8, 8]), tensor(1.), ['a square', 'a square'])
    """

    encode_captions: EncodeCaptions | None = None
    """Encodes captions as ids, in the workers. Keys and epoch seed its randomness."""

    def __call__(self, items: Sequence[Item], epoch: int) -> Batch:
        """Stacks the items of one batch."""
        batch: Batch = {name: [item[name] for item in items] for name in ("key", "caption")}
        batch["epoch"] = epoch
        if "image" in items[0]:
            batch["image"] = torch.stack([item["image"] for item in items]).float().div_(255)
        if "codes" in items[0]:
            batch["codes"] = torch.stack([item["codes"] for item in items])
        if "layers" in items[0]:
            batch |= {name: [item[name] for item in items] for name in ("layers", "recolored")}
            batch["cells"] = torch.stack([item["cells"] for item in items])
        if self.encode_captions is not None:
            batch["text"] = self.encode_captions(batch["caption"], batch["key"], epoch)
        return batch


_PLAIN = Collate()


def iterate_batches(dataset: CaptionedDataset, batch_size: int, collate: Collate = _PLAIN) -> Iterator[Batch]:
    """Yields every usable item of epoch 0 once, in stored order; the last batch may be smaller.

    Example:
        >>> from dalle_zoo.data import ImageTextDataset, open_source
        >>> dataset = ImageTextDataset(open_source("composition:val-styles"), transform="center", size=32)
        >>> next(iterate_batches(dataset, batch_size=4))["image"].shape
        torch.Size([4, 3, 32, 32])
    """
    check_positive(batch_size=batch_size)
    items = iter(dataset)
    while chunk := list(itertools.islice(items, batch_size)):
        yield collate(chunk, 0)


class EmptyDataError(ValueError):
    """The data set has no usable sample.

    Example:
        >>> ResumableLoader([], batch_size=4, seed=0)
        Traceback (most recent call last):
        dalle_zoo.data.loader.EmptyDataError: the data set is empty. Check its location.
    """


@dataclass(frozen=True)
class _Lane:
    """The batches of one worker: ``index, index + step, ...`` of one epoch on one rank."""

    dataset: CaptionedDataset
    collate: Collate
    seed: int | None
    epoch: int
    start: int
    stop: int
    batch_sizes: tuple[int, ...]
    """Sizes of all batches of the rank."""
    index: int
    step: int
    skip: int
    """Number of batches that the rank had returned before the run was interrupted."""
    position: int
    """Number of records that the lane had read for them, with those that could not be used."""

    def __iter__(self) -> Iterator[_Read]:
        skipped: list[Skipped] = []
        items = self._endless(skipped)
        for number in range(self.index, len(self.batch_sizes), self.step):
            if number >= self.skip:
                chunk = list(itertools.islice(items, self.batch_sizes[number]))
                yield self.collate([item for _, item in chunk], self.epoch), skipped.copy(), chunk[-1][0]
                skipped.clear()

    def _endless(self, skipped: list[Skipped]) -> Iterator[tuple[int, Item]]:
        """Reads the lane's items, and then those of the other lanes, again and again.

        Unusable samples must not end an epoch early, and a lane whose own samples are all unusable, such as those of a
        shard without captions, takes samples of others: it must not end a run that other lanes can continue.

        Yields:
            The number of records up to this item, and the item.
        """
        position = self.position
        while True:
            usable = position % len(self.dataset)  # perhaps none, but the next pass will tell
            for record in self._records(position % len(self.dataset)):
                item = record if isinstance(record, Skipped) else self.dataset.item(record, self.epoch)
                position += not isinstance(record, Skipped) or record.listed
                if isinstance(item, Skipped):
                    skipped.append(item)
                    continue
                usable += 1
                yield position, item
            if not usable:
                reasons = "; ".join(str(record) for record in skipped[:3]) or "the files hold fewer than listed"
                raise EmptyDataError(f"none of {len(self.dataset)} samples can be used: {reasons}. Check the data.")

    def _records(self, skip: int) -> Iterator[Record | Skipped]:
        """Reads the data set once, from the lane's own records on, without the first ``skip`` ones."""
        for start, stop in ((self.start, self.stop), (self.stop, len(self.dataset)), (0, self.start)):
            passed = min(skip, stop - start)
            if start + passed < stop:
                yield from self.dataset.records(seed=self.seed, epoch=self.epoch, start=start, stop=stop, skip=passed)
            skip -= passed


class _Lanes(torch.utils.data.IterableDataset["_Read | EmptyDataError"]):
    """The lanes of one rank; worker w reads lane w.

    `EmptyDataError` is returned as data: raised in a worker, its message would be the worker's traceback, and the
    other workers would stay alive for seconds.
    """

    def __init__(self, lanes: Sequence[_Lane]) -> None:
        super().__init__()
        self.lanes = lanes

    def __iter__(self) -> Iterator[_Read | EmptyDataError]:
        worker = torch.utils.data.get_worker_info()
        try:
            yield from self.lanes[0 if worker is None else worker.id]
        except EmptyDataError as error:
            yield error


def _as_is(record: Any) -> Any:
    return record


class ResumableLoader:
    """Loads the batches of a data set, epoch after epoch, from a position that can be saved and restored.

    An epoch has ``len(loader)`` batches on every rank. It is shuffled by ``(seed, epoch)``, and all ranks and workers
    together read each sample once. A restored loader continues with the batches that an uninterrupted one would have
    returned. Each `iter` starts at the restored position, or else at the beginning of an epoch: of the next one if
    the last was not finished.

    Unusable samples are recorded in `skipped`, named in a warning, and replaced by samples that follow those of the
    same stream, so that every rank has the same number of batches.

    Args:
        dataset: Data set to read.
        batch_size: Samples per batch on each rank.
        seed: Seed of the order.
        num_workers: Processes that read and decode; 0 uses the current process. It changes the order of samples.
        rank: Rank of this process.
        world_size: Number of processes that train together.
        drop_last: Whether to drop the last samples if they do not fill a batch; otherwise the last batch is smaller.
        shuffle: Whether to shuffle. False repeats epoch 0 in stored order, with its crops and captions, for
            validation.
        collate: Makes a batch of items.
        limit: Batches after which an epoch ends, or the share of batches as a float, as in the trainer's
            ``limit_train_batches``. Defaults to all.

    Raises:
        ValueError: An option is out of range, or there are too few samples for one batch. An `EmptyDataError`, also
            while reading, means that no sample can be used.

    Example:
        >>> from dalle_zoo.data import ImageTextDataset, open_source
        >>> dataset = ImageTextDataset(open_source("composition:val-styles"), transform="prior", size=32)
        >>> loader, resumed = (ResumableLoader(dataset, batch_size=4, seed=0) for _ in range(2))
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> resumed.load_state_dict(loader.state_dict())  # continues with the second batch
        >>> next(iter(resumed))["key"] == next(batches)["key"]
        True
    """

    def __init__(
        self,
        dataset: CaptionedDataset,
        batch_size: int,
        *,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        shuffle: bool = True,
        collate: Collate = _PLAIN,
        limit: float | None = None,
    ) -> None:
        check_positive(batch_size=batch_size, world_size=world_size)
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1} (world_size {world_size}), got {rank}")
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.seed = seed if shuffle else None
        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self._batch_sizes = self._plan_batches(drop_last)
        self._batches_per_epoch = self._limited(limit)
        self._epoch = 0
        self._done = 0
        self._positions = self._start()
        self._restored = False
        self.skipped: dict[str, str] = {}
        """Reasons for the samples skipped so far, by key."""
        self.waited = 0.0
        """Seconds in which the batches returned so far were waited for."""

    def _plan_batches(self, drop_last: bool) -> tuple[int, ...]:
        total = len(self.dataset)
        if total == 0:
            raise EmptyDataError("the data set is empty. Check its location.")
        if total < self.world_size:
            raise ValueError(f"{total} sample(s) cannot be shared by {self.world_size} ranks: train on fewer")
        per_rank = total // self.world_size if drop_last else -(-total // self.world_size)
        full, rest = divmod(per_rank, self.batch_size)
        sizes = (self.batch_size,) * full + ((rest,) if rest and not drop_last else ())
        if not sizes:
            raise ValueError(
                f"batch_size {self.batch_size} in each of {self.world_size} processes needs at least "
                f"{self.batch_size * self.world_size} samples, got {total}: lower it to at most {per_rank}"
            )
        return sizes

    def _limited(self, limit: float | None) -> int:
        """Batches after which an epoch ends; the length stays that of the data, as the trainer expects."""
        if limit is None:
            return len(self)
        if limit <= 0:
            raise ValueError(f"limit must be above 0 batches, got {limit}")
        return min(len(self), limit) if isinstance(limit, int) else max(1, int(len(self) * limit))

    def __len__(self) -> int:
        """Number of batches per epoch and rank."""
        return len(self._batch_sizes)

    def __iter__(self) -> Iterator[Batch]:
        if self._restored:
            self._restored = False
        elif self._done:
            self._begin(self._epoch + 1)
        epoch, skip = self._epoch, self._done
        for record in self._timed(self._read(epoch, skip)):
            if isinstance(record, EmptyDataError):
                raise record
            batch, skipped, position = record
            self._record_skipped(skipped)
            self._positions[self._done % len(self._positions)] = position
            self._done += 1
            last = self._done == self._batches_per_epoch
            if last:
                # Before the yield, since a trainer that knows the length does not request the end.
                self._begin(epoch + 1)
                self._summarize()
            yield batch
            if last:
                return

    def _timed(self, records: Iterator[Any]) -> Iterator[Any]:
        """Adds up the time in which the trainer waits for records."""
        while True:
            began = time.perf_counter()
            record = next(records, None)
            self.waited += time.perf_counter() - began
            if record is None:
                return
            yield record

    def state_dict(self) -> dict[str, Any]:
        """The position, which is the same on every rank: Lightning saves that of rank 0 only.

        In a distributed run every rank calls it, since it collects the positions of all readers.
        """
        return {
            "epoch": self._epoch,
            "batches": self._done,
            "positions": self._positions_everywhere(),
            **self._layout(),
        }

    def _positions_everywhere(self) -> list[Any]:
        """Records that each reader of each rank has read in the epoch; None for a rank that is not known."""
        all_ranks: list[Any] = [None] * self.world_size
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_gather_object(all_ranks, self._positions)
        all_ranks[self.rank] = self._positions.copy()
        return all_ranks

    def _start(self, done: int = 0) -> list[int]:
        """Positions of the readers of this rank after a number of batches, if all of their samples can be used."""
        count = max(self.num_workers, 1)
        return [sum(self._batch_sizes[reader:done:count]) for reader in range(count)]

    def _begin(self, epoch: int) -> None:
        self._epoch, self._done, self._positions = epoch, 0, self._start()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after a position of `state_dict` at the next `iter`."""
        done = state["batches"]
        if "positions" not in state and done:
            log.warning(
                "the checkpoint does not state how far the data were read: if some of the first %d batches could not "
                "be used, some samples are repeated",
                done,
            )
        # With another number of processes or batch size, skip as many samples of all of them together.
        before, now = (s.get("batch_size", 1) * s.get("world_size", 1) for s in (state, self._layout()))
        if "world_size" in state and before != now:
            done = min(done * before // now, len(self) - 1)
        if not 0 <= done < len(self):
            raise ValueError(
                f"the saved position is batch {done} of an epoch that now has {len(self)} batches: "
                "resume with the original data and batch_size"
            )
        for name, value in self._layout().items():
            if state.get(name, value) != value:
                log.warning(
                    "%s was %d when the position was saved and is %d now: the batches will differ "
                    "from those of an uninterrupted run",
                    name,
                    state[name],
                    value,
                )
        self._epoch, self._done, self._restored = state["epoch"], done, True
        same = all(state.get(name) == value for name, value in self._layout().items())
        known = state["positions"][self.rank] if same and "positions" in state else None
        self._positions = self._start(done) if known is None else list(known)
        if done >= self._batches_per_epoch:  # saved at the end of a limited epoch, as an unfinished one
            self._begin(state["epoch"] + 1)

    def _layout(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("batch_size", "num_workers", "world_size")}

    def _read(self, epoch: int, skip: int) -> Iterator[_Read | EmptyDataError]:
        lanes = self._lanes(epoch, skip)
        if self.num_workers == 0:
            return iter(lanes[0])
        # The workers are queried in order from worker 0, which must have the lane of the next batch.
        first = skip % len(lanes)
        return iter(
            torch.utils.data.DataLoader(
                _Lanes(lanes[first:] + lanes[:first]),
                batch_size=None,
                collate_fn=_as_is,
                num_workers=len(lanes),
                # Its own generator: each start samples a seed, and a resumed run starts once more.
                generator=torch.Generator(),
            )
        )

    def _lanes(self, epoch: int, skip: int) -> list[_Lane]:
        """Divides the rank's positions: each lane gets those of its batches and a share of the rest."""
        count = max(self.num_workers, 1)
        start, stop = (len(self.dataset) * r // self.world_size for r in (self.rank, self.rank + 1))
        left = stop - start - sum(self._batch_sizes)
        ends = [
            start + done + left * (index + 1) // count
            for index, done in enumerate(itertools.accumulate(sum(self._batch_sizes[i::count]) for i in range(count)))
        ]
        return [
            _Lane(
                self.dataset,
                self.collate,
                self.seed,
                0 if self.seed is None else epoch,
                low,
                high,
                self._batch_sizes,
                index,
                count,
                skip,
                self._positions[index],
            )
            for index, (low, high) in enumerate(itertools.pairwise([start, *ends]))
        ]

    def _record_skipped(self, skipped: Sequence[Skipped]) -> None:
        for record in skipped:
            if record.key not in self.skipped:
                self.skipped[record.key] = record.reason
                log.warning("skipped %s", record)

    def _summarize(self) -> None:
        if self.skipped:
            count = len(self.skipped)
            log.warning("%d samples or parts of files have been skipped so far; see the warnings above", count)
