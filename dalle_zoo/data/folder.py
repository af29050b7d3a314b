"""A folder tree of images and caption files as a `SampleSource`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from dalle_zoo.data.samples import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Sample,
    SampleSource,
    Skipped,
    read_captions,
)
from dalle_zoo.seeds import seeded_rng


def suffix_of(path: Path) -> str:
    """Suffix in lower case, without the dot."""
    return path.suffix.lower().removeprefix(".")


class FolderSource(SampleSource):
    """Images in a folder and its subfolders, with captions in .txt or .json files of the same name.

    The key of an image is its path relative to the folder without the suffix, so equal names in different folders
    differ. Images whose paths differ only in the suffix keep it in their keys. All samples are shuffled together.

    Args:
        root: The folder. Hidden files and folders are ignored.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def images(self) -> dict[str, Path]:
        """Images by key, sorted."""
        paths = [
            path.relative_to(self.root)
            for path in self.root.rglob("*")
            if suffix_of(path) in IMAGE_SUFFIXES and path.is_file()
        ]
        paths = sorted(p for p in paths if not any(part.startswith(".") for part in p.parts))
        stems = Counter(path.with_suffix("") for path in paths)
        return {(p if stems[p.with_suffix("")] > 1 else p.with_suffix("")).as_posix(): p for p in paths}

    @property
    def num_samples(self) -> int:
        """Number of images in the folder and its subfolders."""
        return len(self.images)

    def fingerprint(self) -> str:
        """SHA-256 of the names and sizes of images and captions."""
        digest = hashlib.sha256()
        for relative in self.images.values():
            files = [relative, *(relative.with_suffix(f".{s}") for s in sorted(CAPTION_SUFFIXES))]
            sizes = [_size(self.root / file) for file in files]
            digest.update(json.dumps([relative.as_posix(), sizes]).encode())
        return digest.hexdigest()

    def read(self, *, seed: int | None, epoch: int, start: int, stop: int) -> Iterator[Sample | Skipped]:
        """As `SampleSource.read`."""
        keys = list(self.images)
        if seed is not None:
            # The string is part of the seed of the shuffle: another one would change the order of every run.
            seeded_rng("pictures", seed, epoch).shuffle(keys)
        for key in keys[start:stop]:
            path = self.root / self.images[key]
            try:
                image = path.read_bytes()
            except OSError as error:
                yield Skipped(key, f"cannot be read ({error})")
                continue
            texts = [_bytes(path.with_suffix(suffix)) for suffix in (".json", ".txt")]
            yield Sample(key, image, read_captions(*texts))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
