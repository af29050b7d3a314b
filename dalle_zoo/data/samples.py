"""Base of the readers: captioned images, in an order that depends only on the arguments."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"})
"""Suffixes of image files, in lower case and without the dot."""
CAPTION_SUFFIXES = frozenset({"txt", "json"})
"""Suffixes of caption files, which have the name of their image."""


@dataclass(frozen=True)
class Sample:
    """One captioned image, not decoded yet."""

    key: str
    """Name, unique in its source; it seeds all randomness of the sample."""
    image: bytes
    """Contents of the image file."""
    captions: tuple[str, ...]
    """Zero or more captions."""


@dataclass(frozen=True)
class Skipped:
    """Replaces a sample, or a part of a file, that cannot be used."""

    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


class SampleSource(ABC):
    """A source of images with captions.

    Positions ``0 .. num_samples - 1`` number the samples in the order of one epoch. The order depends only on
    ``(seed, epoch)``, so disjoint positions are disjoint samples in every process.
    """

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of listed samples, including corrupt ones."""

    @abstractmethod
    def read(self, *, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Sample | Skipped]:
        """Reads the samples at positions ``start .. stop - 1`` of an epoch, with a `Skipped` for each unreadable one.

        Args:
            seed: Seed of the order; None for the stored order.
            epoch: Number of the pass over the data, which determines the order.
            start: First position.
            stop: Position after the last.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the names and sizes of the files."""

    def __len__(self) -> int:
        return self.num_samples

    def stream(
        self, *, seed: int | None = None, epoch: int = 0, part: int = 0, num_parts: int = 1
    ) -> Iterator[Sample]:
        """Reads one of ``num_parts`` disjoint parts of the source, whose sizes differ by at most one.

        Unreadable samples are skipped with a warning.
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
    r"""Returns the captions of an image from its .json file, or else from its .txt file.

    The .json file has a list ``captions`` or a string ``caption``; every line of the .txt file is a caption. A file
    that cannot be read counts as missing.

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
