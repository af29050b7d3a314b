"""Base of the readers: captioned images, in an order that depends only on the arguments."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from dalle_zoo.data.captions import NO_CAPTION, read_captions, valid_captions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One captioned image, not decoded yet.

    Example:
        >>> next(read_sample("dot", b"P6 1 1 255 abc", None, b"a gray dot"))
        Sample(key='dot', image=b'P6 1 1 255 abc', captions=('a gray dot',), problem='')
    """

    listed: ClassVar[bool] = True

    key: str
    """Name, unique in its source; it seeds all randomness of the sample."""
    image: bytes
    """Contents of the image file."""
    captions: tuple[str, ...]
    """Zero or more captions, all of them valid Unicode."""
    problem: str = ""
    """Why captions are missing, if the reason is known."""


@dataclass(frozen=True)
class Skipped:
    """Replaces a sample, or a part of a file, that cannot be used.

    Example:
        >>> str(captioned(Sample("dot", b"P6 1 1 255 abc", (), problem="the caption is not UTF-8")))
        'dot: the caption is not UTF-8'
    """

    key: str
    reason: str
    listed: bool = True
    """Whether it replaces a sample that `SampleSource.num_samples` counts, and thus has a position. Each of several
    samples that are lost together is replaced, under the key of their file."""

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def read_sample(
    key: str, image: bytes, json_text: bytes | None, plain_text: bytes | None, problem: str = ""
) -> Iterator[Sample | Skipped]:
    """Makes a sample of the contents of its files.

    Yields:
        The sample, and a `Skipped` if only some of its captions can be used.
    """
    captions, invalid = valid_captions(read_captions(json_text, plain_text))
    yield Sample(key, image, captions, problem or invalid)
    if captions and invalid:
        yield Skipped(f"{key} (one of its captions)", invalid, listed=False)


def captioned(record: Sample | Skipped) -> Sample | Skipped:
    """Replaces a sample without a caption by a `Skipped` that says why it has none."""
    if isinstance(record, Sample) and not record.captions:
        return Skipped(record.key, record.problem or NO_CAPTION)
    return record


class SampleSource(ABC):
    """A source of images with captions.

    Positions ``0 .. num_samples - 1`` number the samples in the order of one epoch. The order depends only on
    ``(seed, epoch)``, so disjoint positions are disjoint samples in every process.

    Example:
        >>> class Dots(SampleSource):
        ...     num_samples = 3
        ...     def fingerprint(self):
        ...         return "three dots"
        ...     def read(self, *, seed, epoch, start, stop, skip=0):  # always in stored order
        ...         for number in range(start + skip, stop):
        ...             yield Sample(str(number), b"P6 1 1 255 abc", (f"dot {number}",))
        >>> [sample.captions[0] for sample in Dots().stream(part=1, num_parts=2)]
        ['dot 1', 'dot 2']
    """

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of listed samples, including corrupt ones."""

    @abstractmethod
    def read(
        self, *, seed: int | None, epoch: int, start: int, stop: int, skip: int = 0
    ) -> Iterator[Sample | Skipped]:
        """Reads the samples at positions ``start .. stop - 1`` of an epoch, with a `Skipped` for each unreadable one.

        Args:
            seed: Seed of the order; None for the stored order.
            epoch: Number of the pass over the data, which determines the order.
            start: First position.
            stop: Position after the last.
            skip: Number of listed records at the beginning of what is returned that are left out, in little more time
                than it takes to count them. Defaults to 0.
        """

    def read_captions(self, start: int, stop: int) -> Iterator[Sample | Skipped]:
        """Reads like `read`, in stored order; the images may be empty."""
        return self.read(seed=None, epoch=0, start=start, stop=stop)

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the names and sizes of the files."""

    def __len__(self) -> int:
        return self.num_samples

    def stream(
        self,
        *,
        seed: int | None = None,
        epoch: int = 0,
        part: int = 0,
        num_parts: int = 1,
        needs_captions: bool = False,
    ) -> Iterator[Sample]:
        """Reads one of ``num_parts`` disjoint parts of the source, whose sizes differ by at most one.

        Unreadable samples are skipped with a warning, and so are those without a caption with ``needs_captions``.
        """
        if not 0 <= part < num_parts:
            raise ValueError(f"part must be in 0..{num_parts - 1} (num_parts {num_parts}), got {part}")
        total = self.num_samples
        start, stop = total * part // num_parts, total * (part + 1) // num_parts
        yield from usable(self.read(seed=seed, epoch=epoch, start=start, stop=stop), needs_captions=needs_captions)


def usable(records: Iterable[Sample | Skipped], *, needs_captions: bool) -> Iterator[Sample]:
    """Yields the samples among records, and warns about the others: once per key, and about their number."""
    skipped, named = 0, set()
    for record in records:
        found = captioned(record) if needs_captions else record
        if isinstance(found, Sample):
            yield found
            continue
        skipped += 1
        if found.key not in named:  # a shard has one key for all samples that it lacks
            log.warning("skipped %s", found)
        named.add(found.key)
    if skipped:
        log.warning("%d samples or parts of files are not used; each is named above", skipped)
