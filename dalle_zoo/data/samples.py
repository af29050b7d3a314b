"""What every reader gives: captioned images, in an order that its arguments decide alone."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"})
"""Endings, in lower case and without the dot, that are taken for images."""
CAPTION_SUFFIXES = frozenset({"txt", "json"})
"""Endings of the files beside an image that may hold its captions."""


@dataclass(frozen=True)
class Sample:
    """One captioned image, still undecoded."""

    key: str
    """Name, unique in its source; all randomness of the sample is derived from it."""
    image: bytes
    """Contents of the image file."""
    captions: tuple[str, ...]
    """Zero or more captions."""


@dataclass(frozen=True)
class Skipped:
    """Takes the place of a sample, or of a stretch of a file, that could not be used."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class SampleSource(ABC):
    """Images with captions, wherever they are stored.

    Positions ``0 .. num_samples - 1`` count the samples in the order of one epoch. That order
    depends on ``(seed, epoch)`` alone, so any division of the positions divides the samples.
    """

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples that the source lists; corrupt ones are among them."""

    @abstractmethod
    def read(self, *, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Sample | Skipped]:
        """Samples at positions ``start .. stop - 1`` of an epoch, a `Skipped` for each unreadable one.

        Args:
            seed: Seed of the shuffling; None keeps the stored order.
            epoch: Pass over the data; each has its own order.
            start: First position.
            stop: One past the last position.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the names and sizes of the files."""

    def __len__(self) -> int:
        return self.num_samples

    def stream(
        self, *, seed: int | None = None, epoch: int = 0, part: int = 0, num_parts: int = 1
    ) -> Iterator[Sample]:
        """One of ``num_parts`` disjoint parts, together complete, equal in size to within one.

        What cannot be read is left out and named in a warning.
        """
        if not 0 <= part < num_parts:
            raise ValueError(f"part must lie in 0..{num_parts - 1} (num_parts {num_parts}), got {part}")
        total = self.num_samples
        start, stop = total * part // num_parts, total * (part + 1) // num_parts
        for record in self.read(seed=seed, epoch=epoch, start=start, stop=stop):
            if isinstance(record, Skipped):
                log.warning("skipped %s", record)
            else:
                yield record


def read_captions(json_text: bytes | None, plain_text: bytes | None) -> tuple[str, ...]:
    r"""Captions beside an image, from its .json or else its .txt.

    The .json may hold a list ``captions`` or a string ``caption``; in the .txt, every line is one.
    A file that cannot be read counts as missing.

    Example:
        >>> read_captions(b'{"captions": ["a cat", "one cat"]}', b"a cat")
        ('a cat', 'one cat')
        >>> read_captions(None, b"a cat\n\none cat\n")
        ('a cat', 'one cat')
    """
    return _captions_of_json(json_text) or _captions_of_lines(plain_text)


def _captions_of_json(text: bytes | None) -> tuple[str, ...]:
    try:
        record = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return ()
    if not isinstance(record, dict):
        return ()
    several = record.get("captions")
    for captions in (several if isinstance(several, list) else [], [record.get("caption")]):
        found = tuple(c.strip() for c in captions if isinstance(c, str) and c.strip())
        if found:
            return found
    return ()


def _captions_of_lines(text: bytes | None) -> tuple[str, ...]:
    try:
        lines = (text or b"").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        return ()
    return tuple(line.strip() for line in lines if line.strip())
