"""Datasets of evaluations: the registry, the type that readers return, and helpers of readers."""

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
"""Maximum number of skipped entries that a result lists."""


class DatasetError(ValueError):
    """A dataset is unusable. The message states what was expected, what was found, and what to do.

    Example:
        >>> EvalDataset(name="birds", root="photos/birds", items=())
        Traceback (most recent call last):
        dalle_zoo_eval.datasets.base.DatasetError: dataset birds in photos/birds holds no usable image
    """


class UnavailableGroupError(DatasetError):
    """The user's own files do not allow a split. A run leaves out its group, and continues with the others.

    Example:
        >>> raise UnavailableGroupError("no sprite has a style")
        Traceback (most recent call last):
        dalle_zoo_eval.datasets.base.UnavailableGroupError: no sprite has a style
    """


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image of a dataset, not yet decoded.

    Example:
        >>> item = Item(key="birds/robin", image=None, captions=("a robin",), concept="robin")
        >>> item.box is None, item.concept
        (True, 'robin')
    """

    key: str
    """Name that is unique in the dataset: a relative path without suffix."""
    image: Path | bytes | None
    """Image file, or its contents; None if only captions are available."""
    captions: tuple[str, ...]
    """Captions, not empty and without line breaks. The tuple is empty in a folder without captions."""
    box: tuple[float, float, float, float] | None = None
    """Bounding box of the depicted object: left, top, width and height in pixels."""
    invalid: str = ""
    """Reason why captions were left out; empty if none were."""
    concept: str = ""
    """Class or concept of the image; empty if the dataset has none."""
    targets: Mapping[str, Any] = field(default_factory=dict)
    """What an image of the caption should show, for metrics whose `update` takes ``targets``."""


@dataclass(frozen=True, kw_only=True)
class EvalDataset:
    """Images and captions of an evaluation. Most readers sort them by key.

    Raises:
        DatasetError: There are no items, or two have the same key.

    Example:
        >>> items = tuple(Item(key=key, image=None, captions=(f"a {key}",)) for key in ("robin", "wren", "owl"))
        >>> here, there = (EvalDataset(name="birds", root=root, items=items) for root in ("here", "there"))
        >>> here.sha256() == there.sha256()  # of the contents
        True
    """

    name: str
    """Layout and split, such as ``coco:val2014``."""
    root: Path | str
    """Folder or location of the dataset, for messages."""
    items: tuple[Item, ...]
    """Usable images and captions."""
    skipped: tuple[str, ...] = ()
    """Entries that were left out, as "key: reason"."""
    any_number: bool = False
    """Whether the user's own files determine the prompts, so that there may be few, of as few as two concepts. Samples
    then alternate between concepts, and fewer captions than requested are accepted. Defaults to False."""

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
        """Returns the number of skipped entries and the names of the first ones, for the result file."""
        return {"skipped": len(self.skipped), "skipped_names": [s.partition(": ")[0] for s in self.skipped[:NAMED]]}

    def sha256(self, memo: Path | None = None) -> str:
        """Returns a digest of keys, captions, boxes, concepts, targets, and names and contents of the image files.

        It does not depend on the location of the folder or of the images in it.

        Args:
            memo: JSON file with digests of images, written by `remember`. Defaults to none.
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
"""Maps (root, split) to a dataset. The root is the folder given with ``--data``, or None."""


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
    """Reads a dataset without decoding images.

    Entries without captions or images are left out, listed in `EvalDataset.skipped`, and counted in a logged warning.

    Args:
        layout: Name in `DATASETS`, such as ``coco``, ``cub``, ``attngan`` or ``folder``.
        root: Folder of the dataset; None for datasets that need none.
        split: Split of the layout; see its reader.

    Raises:
        UnknownNameError: There is no such layout or split.
        DatasetError: The folder or files are missing, damaged or contradict each other, or no entry is usable.
        UnavailableGroupError: The user's own files do not allow the split.

    Example:
        >>> from dalle_zoo_eval.datasets import read_dataset
        >>> len(read_dataset("composition", None, "plain").items) > 0
        True
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


# ---------------------------------------------------------------- helpers of readers


def check_split(layout: str, split: str, known: Iterable[str]) -> None:
    """Raises `UnknownNameError` for a split that a layout does not have."""
    if split not in (splits := list(known)):
        raise UnknownNameError(suggest(f"split of {layout}", split, splits))


def usable(
    name: str, root: Path, items: Iterable[Item], skipped: Sequence[str] = (), *, needs_captions: bool = True
) -> EvalDataset:
    """Returns the dataset of all items with valid captions and an image file; skipped entries are listed in it.

    Args:
        name: Layout and split.
        root: Folder of the dataset.
        items: All entries, in any order.
        skipped: Entries that the reader has left out. Defaults to none.
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
    """Removes captions that are not valid Unicode."""
    captions, invalid = valid_captions(item.captions)
    return replace(item, key=valid_name(item.key), captions=captions, invalid=item.invalid or invalid)


def missing(layout: str, root: Path, what: str) -> DatasetError:
    """Returns the error for a missing file or folder, with the layout that the given folder seems to have.

    Args:
        layout: Requested layout.
        root: Folder of the dataset.
        what: Missing path or paths, relative to the folder.
    """
    hint = ""
    if (found := _recognized(root)) and found != layout:
        hint = f" The folder looks like the layout {found!r}."
    elif not found and (inside := {p.name: look for p in sorted(root.iterdir()) if (look := _recognized(p))}):
        name, found = next(iter(inside.items()))
        hint = f" Its folder {name} looks like the layout {found!r}: give that folder instead."
    return DatasetError(f"{root}: there is no {what}. The layout {layout!r} has {DATASETS.spec(layout).files}.{hint}")


def _recognized(folder: Path) -> str | None:
    """Returns the layout that a folder seems to have; None if it is unknown."""
    return next((spec.name for spec in DATASETS.specs() if spec.mark and (folder / spec.mark).exists()), None)


def read_lines(layout: str, root: Path, name: str) -> list[str]:
    """Returns the stripped, non-empty lines of a text file of a layout; raises `DatasetError` if it is missing."""
    try:
        lines = (root / name).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise missing(layout, root, name) from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{root / name} must be a text file in UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def checked_key(key: object, where: str) -> str:
    """Returns a key from an external file; raises `DatasetError` if it points outside of the dataset's folder."""
    if not isinstance(key, str) or not key or "\0" in key:
        raise DatasetError(f"{where}: expected the name of an image, got {key!r}")
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts or "\\" in key:
        raise DatasetError(f"{where}: expected a name inside the folder of the images, got {key!r}")
    return key


def clean_captions(captions: Iterable[str]) -> tuple[str, ...]:
    r"""Returns captions with single spaces between words; empty captions are dropped.

    Some captions of MS-COCO contain line breaks. The replacement character U+FFFD, which marks lost characters in some
    captions of birds, is treated as a space.

    Example:
        >>> clean_captions([" a cat\non a mat ", " "])
        ('a cat on a mat',)
    """
    words = (caption.replace("\ufffd", " ").split() for caption in captions)
    return tuple(" ".join(caption) for caption in words if caption)


def captions_beside(path: Path) -> tuple[str, ...]:
    """Returns the captions of a text file, one per line; none if the file is missing. `usable` drops invalid ones."""
    try:
        return clean_captions(read_captions(None, read_file(path, MAX_CAPTION_BYTES)))
    except CorruptImageError:
        return ()
