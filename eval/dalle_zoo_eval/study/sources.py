"""Captions of a study, and the image that each system has for each of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_zoo_eval.datasets import DatasetError, Item, read_dataset
from dalle_zoo_eval.datasets.manifest import MANIFEST, read_caption_file, read_manifest
from dalle_zoo_eval.study.errors import StudyError


@dataclass(frozen=True, kw_only=True)
class System:
    """Images of one system."""

    name: str
    """Name in the report."""
    images: tuple[Path, ...]
    """One image per caption, in the order of the captions."""


def read_captions(path: Path) -> list[str]:
    """Returns `read_caption_file`, with errors of studies."""
    try:
        return read_caption_file(path)
    except DatasetError as error:
        raise StudyError(str(error)) from None


def read_system(path: Path, name: str, captions: Sequence[str]) -> System:
    """Reads the images of a system.

    A manifest, or a folder with one, gives the first image of each prompt, which is the best one after reranking. In
    any other folder, images belong to the captions in the text files next to them or, without text files, to the
    captions in the order of their names, in which numbers are compared as numbers.

    Args:
        path: Folder of images, or ``manifest.jsonl``.
        name: Name in the report.
        captions: All captions.

    Raises:
        StudyError: The path is missing, an image is missing, or captions and images do not correspond.
    """
    manifest = path / MANIFEST if path.is_dir() else path
    if manifest.is_file():
        found = _of_manifest(manifest)
    elif path.is_dir():
        items = _items(path)
        if not items[0].captions:
            return System(name=name, images=_in_order(path, items, captions))
        found = [(" ".join(item.captions[0].split()), _file(item)) for item in items]
    else:
        problem = "is not a JSONL manifest" if path.exists() else "does not exist"
        raise StudyError(f"{path} {problem}: expected a folder of images, or {MANIFEST} of dalle-zoo generate")
    return System(name=name, images=_by_caption(path, found, captions))


def _by_caption(path: Path, found: Sequence[tuple[str, Path]], captions: Sequence[str]) -> tuple[Path, ...]:
    """Returns the image of each caption; the k-th repetition of a caption has the k-th of its images."""
    images: dict[str, list[Path]] = defaultdict(list)
    for caption, image in found:
        images[caption].append(image)
    missing = [caption for caption in captions if caption not in images]
    if missing:
        raise StudyError(
            f"{path} has no image for {len(missing)} of {len(captions)} captions, such as {missing[0]!r}: generate "
            "them, or remove these captions from the file"
        )
    used: dict[str, int] = defaultdict(int)
    chosen = []
    for caption in captions:
        own = images[caption]
        chosen.append(own[min(used[caption], len(own) - 1)])
        used[caption] += 1
    return tuple(chosen)


def _in_order(path: Path, items: Sequence[Item], captions: Sequence[str]) -> tuple[Path, ...]:
    if len(items) != len(captions):
        raise StudyError(
            f"{path} has {len(items)} images for {len(captions)} captions: without text files or {MANIFEST}, there "
            "must be one image per caption, in the order of their names"
        )
    return tuple(_file(item) for item in sorted(items, key=lambda item: _natural(item.key)))


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Returns the key that sorts names with numbers by number: 2 before 10."""
    parts = re.split(r"(\d+)", key)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def _items(path: Path) -> Sequence[Item]:
    try:
        return read_dataset("folder", path, "all").items
    except DatasetError as error:
        raise StudyError(str(error)) from None


def _file(item: Item) -> Path:
    assert isinstance(item.image, Path)  # the reader of folders returns files
    return item.image


def _of_manifest(path: Path) -> list[tuple[str, Path]]:
    """Returns prompt and first image of each row of a file of prompts."""
    found: dict[str, tuple[str, Path]] = {}
    try:
        for row in read_manifest(path):
            found.setdefault(row.id, (row.prompt, row.image))
    except DatasetError as error:
        raise StudyError(str(error)) from None
    return list(found.values())
