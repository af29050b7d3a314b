"""What every reader of a dataset returns: captioned images, and the names of those it left out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from dalle_zoo.data.captions import MAX_CAPTION_BYTES, read_captions, valid_captions
from dalle_zoo.data.decoding import CorruptImageError, read_file
from dalle_zoo.data.selection import valid_name
from dalle_zoo.registry import SpecRegistry, UnknownNameError, suggest
from dalle_zoo_eval.datasets.digests import content_digests

log = logging.getLogger(__name__)

NAMED = 20
"""Entries left out that a result names."""


class DatasetError(ValueError):
    """A dataset is not what it should be; the message states what was expected, what was found, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a dataset, not yet decoded."""

    key: str
    """Name, unique in its dataset: a relative path without its ending."""
    image: Path | bytes | None
    """Image file, or its contents; None if only the captions are available."""
    captions: tuple[str, ...]
    """Captions without line breaks, not empty; none at all in a folder without captions."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, width and height of what the image shows, in pixels."""
    invalid: str = ""
    """Why captions were left out."""
    concept: str = ""
    """Class or concept of what the image shows, where the dataset has classes."""
    targets: Mapping[str, Any] = field(default_factory=dict)
    """What an image of the caption must show, for metrics whose `update` takes ``targets``."""


@dataclass(frozen=True, kw_only=True)
class EvalDataset:
    """Images and captions to measure with; the readers sort them by key.

    Raises:
        DatasetError: No item at all, or two of one key.
    """

    name: str
    """Layout and split, such as ``coco:val2014``."""
    root: Path | str
    items: tuple[Item, ...]
    skipped: tuple[str, ...] = ()
    """What was left out, as "key: reason"."""

    def __post_init__(self) -> None:
        if not self.items:
            first = "; ".join(self.skipped[:3])
            left_out = f": all {len(self.skipped)} entries were left out, such as {first}" if first else ""
            raise DatasetError(f"dataset {self.name} in {self.root} holds no usable image{left_out}")
        for before, after in pairwise(sorted(item.key for item in self.items)):
            if before == after:
                raise DatasetError(f"dataset {self.name} in {self.root} lists the image {after!r} twice")

    @property
    def image_files(self) -> list[Path]:
        """All image files."""
        return [item.image for item in self.items if isinstance(item.image, Path)]

    def left_out(self) -> dict[str, Any]:
        """What a result says of the entries that were left out: how many, and the names of the first ones."""
        return {"skipped": len(self.skipped), "skipped_names": [s.partition(": ")[0] for s in self.skipped[:NAMED]]}

    def sha256(self, memo: Path | None = None) -> str:
        """Digest of keys, captions, boxes, classes, and the names and contents of the image files.

        Neither the location of the folder nor the locations of images in it matter.

        Args:
            memo: JSON file with digests of the images, which `remember` wrote.
        """
        digest = hashlib.sha256()
        contents = dict(zip(self.image_files, content_digests(self.image_files, memo), strict=True))
        for item in self.items:
            match item.image:
                case None:
                    image = None
                case bytes():
                    image = [item.key, hashlib.sha256(item.image).hexdigest()]
                case path:
                    image = [path.name, contents[path]]
            record: list[Any] = [item.key, item.captions, item.box, item.concept, image]
            if item.targets:
                record.append(item.targets)
            digest.update(json.dumps(record).encode())
        return digest.hexdigest()


Reader = Callable[[Path | None, str], EvalDataset]
"""(root, split) to a dataset; the root is the folder given with ``--data``, None if there is none."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Layout of a dataset on disk."""

    name: str
    """Name in `DATASETS`."""
    files: str = ""
    """Files that its folder must contain, for messages. Empty if the dataset needs no folder."""
    mark: str = ""
    """File or folder that only this layout has, which identifies a folder. Defaults to none."""


DATASETS: SpecRegistry[Reader, DatasetSpec] = SpecRegistry(
    "evaluation dataset", group="dalle_zoo.eval_datasets", spec=DatasetSpec
)


def read_dataset(layout: str, root: Path | None, split: str) -> EvalDataset:
    """Reads a dataset; no image is decoded yet.

    Entries without captions or without an image are left out, named in `EvalDataset.skipped`, and counted in a
    warning of the log.

    Args:
        layout: A name of `DATASETS`: ``coco``, ``cub``, ``attngan``, ``folder``.
        root: Its folder.
        split: A split of the layout; see the readers.

    Raises:
        UnknownNameError: No such layout or split.
        DatasetError: Files are missing, damaged or do not fit each other, or nothing is left.
    """
    read = DATASETS[layout]
    if root is not None and not root.is_dir():
        found = "it is a file (archives and statistics are not read)" if root.exists() else "there is no such folder"
        raise DatasetError(f"expected a folder of images or of a dataset, got {str(root)!r}: {found}")
    if root is None and DATASETS.spec(layout).files:
        raise DatasetError(f"the folder of the dataset ({layout}) is needed: give it with --data DIR")
    dataset = read(root, split)
    if skipped := dataset.skipped:
        total = len(skipped) + len(dataset.items)
        log.warning("dataset %s: %d of %d entries left out, such as %s", dataset.name, len(skipped), total, skipped[0])
    return dataset


# ---- what the readers share


def check_split(layout: str, split: str, known: Iterable[str]) -> None:
    """Raises `UnknownNameError` for a split that a layout does not have."""
    if split not in (splits := list(known)):
        raise UnknownNameError(suggest(f"split of {layout}", split, splits))


def usable(
    name: str, root: Path, items: Iterable[Item], skipped: Sequence[str] = (), *, needs_captions: bool = True
) -> EvalDataset:
    """Returns the dataset of the items that have valid captions and an image file; the others are listed in it.

    Args:
        name: Layout and split.
        root: Folder of the dataset.
        items: All entries, in any order.
        skipped: What the reader left out before.
        needs_captions: Whether items without a caption are left out. Defaults to True.
    """
    retained, left_out = [], list(skipped)
    for item in sorted(map(_valid, items), key=lambda item: item.key):
        if item.invalid and item.captions:
            left_out.append(f"{item.key} (one of its captions): {item.invalid}")
        if needs_captions and not item.captions:
            left_out.append(f"{item.key}: {item.invalid or 'has no caption'}")
        elif isinstance(item.image, Path) and not item.image.is_file():
            left_out.append(f"{item.key}: its image {item.image} is missing")
        elif isinstance(item.image, Path) and not item.image.stat().st_size:
            left_out.append(f"{item.key}: its image {item.image} is empty")
        else:
            retained.append(item)
    return EvalDataset(name=name, root=root, items=tuple(retained), skipped=tuple(left_out))


def _valid(item: Item) -> Item:
    """Leaves out captions that are not valid Unicode."""
    captions, invalid = valid_captions(item.captions)
    return replace(item, key=valid_name(item.key), captions=captions, invalid=item.invalid or invalid)


def missing(layout: str, root: Path, what: str) -> DatasetError:
    """The error for a file or folder that a layout needs, with what the folder looks like instead.

    Args:
        layout: Requested layout.
        root: Folder that should have it.
        what: The missing path or paths, relative to the folder.
    """
    hint = ""
    if (found := _recognized(root)) and found != layout:
        hint = f" The folder looks like the layout {found!r}."
    elif not found and (inside := {p.name: look for p in sorted(root.iterdir()) if (look := _recognized(p))}):
        name, found = next(iter(inside.items()))
        hint = f" Its folder {name} looks like the layout {found!r}: perhaps name that one."
    return DatasetError(f"{root}: there is no {what}. The layout {layout!r} has {DATASETS.spec(layout).files}.{hint}")


def _recognized(folder: Path) -> str | None:
    """Known layout that a folder seems to have."""
    return next((spec.name for spec in DATASETS.specs() if spec.mark and (folder / spec.mark).exists()), None)


def read_lines(layout: str, root: Path, name: str) -> list[str]:
    """Lines of a text file that a layout needs, stripped, without empty ones."""
    try:
        lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise missing(layout, root, name) from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{root / name} must be a text file in UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def checked_key(key: object, where: str) -> str:
    """A key out of an external file, which must stay inside the folder it is joined to."""
    if not isinstance(key, str) or not key or "\0" in key:
        raise DatasetError(f"{where}: expected the name of an image, got {key!r}")
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or "\\" in key:
        raise DatasetError(f"{where}: expected a name inside the folder of the images, got {key!r}")
    return key


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    r"""Captions with single spaces between words and no others; empty ones are dropped.

    MS-COCO has captions with line breaks in them. The replacement character U+FFFD, which some captions of birds
    have where a character was lost, counts as a space.

    Example:
        >>> clean_captions([" a cat\non a mat ", " "])
        ('a cat on a mat',)
    """
    words = (caption.replace("\ufffd", " ").split() for caption in captions)
    return tuple(" ".join(caption) for caption in words if caption)


def captions_beside(path: Path) -> tuple[str, ...]:
    """Captions of a text file, one per line; none if the file is missing. `usable` drops those that are not UTF-8."""
    try:
        return clean_captions(read_captions(None, read_file(path, MAX_CAPTION_BYTES)))
    except CorruptImageError:
        return ()
