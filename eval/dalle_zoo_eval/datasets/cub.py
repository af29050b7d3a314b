"""CUB-200-2011 with ten captions per image.

```
images.txt  image_class_labels.txt  classes.txt  bounding_boxes.txt  train_test_split.txt    as published
images/<class>/<name>.jpg
zeroshot_train.txt  zeroshot_test.txt    keys, one per line: 150 and 50 classes
text_c10/<class>/<name>.txt              captions, one per line
```

Reference: The Caltech-UCSD Birds-200-2011 Dataset (Wah et al., 2011); captions and the class-disjoint split: Learning
Deep Representations of Fine-Grained Visual Descriptions (Reed et al., 2016).
"""

from __future__ import annotations

import math
from pathlib import Path

from dalle_zoo_eval.datasets.base import (
    DATASETS,
    DatasetError,
    EvalDataset,
    Item,
    captions_beside,
    check_split,
    checked_key,
    missing,
    read_lines,
    usable,
)

# Values of train_test_split.txt by split.
_OFFICIAL = {"train-official": "1", "test-official": "0"}
_ZEROSHOT = {"train": "zeroshot_train.txt", "test": "zeroshot_test.txt"}
SPLITS = (*_ZEROSHOT, *_OFFICIAL)

Box = tuple[float, float, float, float]


@DATASETS.register(
    "cub",
    mark="images.txt",
    files="images.txt, image_class_labels.txt, classes.txt, images/CLASS/NAME.jpg, text_c10/CLASS/NAME.txt, "
    "optionally bounding_boxes.txt, and for the split zeroshot_train.txt with zeroshot_test.txt, or "
    "train_test_split.txt",
)
def read_cub(root: Path | None, split: str) -> EvalDataset:
    """Reads a split; the keys are the paths of the images in ``images/`` without suffix.

    Args:
        root: The folder ``CUB_200_2011``.
        split: ``train`` or ``test`` of the class-disjoint split for text-to-image generation (8,855 and 2,933 images),
            or ``train-official`` or ``test-official``, which have all classes each.

    Raises:
        UnknownNameError: There is no such split.
        DatasetError: Files are missing, damaged or contradict each other, or there is no image of the split.
    """
    check_split("cub", split, SPLITS)
    assert root is not None  # `read_dataset` has checked it
    files = _table(root, "images.txt")
    for folder in ("images", "text_c10"):
        if not (root / folder).is_dir():
            raise missing("cub", root, f"{folder}/")
    labels, names = _table(root, "image_class_labels.txt"), _table(root, "classes.txt")
    _check_ids(root, "image_class_labels.txt", files, labels)
    ids = {_key(root, file): identity for identity, file in files.items()}
    groups = {key: names.get(labels[identity], "") for key, identity in ids.items()}
    for key, group in groups.items():
        if not group:
            raise DatasetError(f"{root / 'classes.txt'} lacks class {labels[ids[key]]}, which {key} belongs to")
    wanted = _zeroshot_keys(root, split, groups) if split in _ZEROSHOT else _official_keys(root, split, files, ids)
    boxes = read_boxes(root) if (root / "bounding_boxes.txt").exists() else {}
    items = [
        Item(
            key=key,
            image=root / "images" / files[ids[key]],
            captions=captions_beside(root / "text_c10" / f"{key}.txt"),
            box=boxes.get(key),
            concept=groups[key],
        )
        for key in wanted
    ]
    return usable(f"cub:{split}", root, items)


def read_boxes(root: Path) -> dict[str, Box]:
    """Reads the bounding boxes of the birds.

    Args:
        root: The folder ``CUB_200_2011``, with images.txt and bounding_boxes.txt.

    Returns:
        Left, top, width and height in pixels for every key of images.txt.

    Raises:
        DatasetError: A file is missing or damaged, or the files contradict each other.
    """
    files, lines = _table(root, "images.txt"), _table(root, "bounding_boxes.txt")
    _check_ids(root, "bounding_boxes.txt", files, lines)
    return {_key(root, file): _box(root, identity, lines[identity]) for identity, file in files.items()}


def _box(root: Path, identity: str, line: str) -> Box:
    try:
        left, top, width, height = map(float, line.split())
    except ValueError:
        left = top = width = height = math.nan
    if not (math.isfinite(left + top) and 0 < width < math.inf and 0 < height < math.inf):
        raise DatasetError(
            f"{root / 'bounding_boxes.txt'}: image {identity} must have left, top, width and height in pixels, "
            f"got {line!r}"
        )
    return left, top, width, height


def _table(root: Path, name: str) -> dict[str, str]:
    """Returns the values of the lines "number value" of a file, by number."""
    table: dict[str, str] = {}
    for line in read_lines("cub", root, name):
        number, _, rest = line.partition(" ")
        if not (number.isdecimal() and rest.strip()):
            raise DatasetError(f"{root / name}: expected lines of a number and a value, got {line!r}")
        if number in table:
            raise DatasetError(f"{root / name} lists number {number} twice")
        table[number] = rest.strip()
    return table


def _check_ids(root: Path, name: str, files: dict[str, str], table: dict[str, str]) -> None:
    if without := [number for number in files if number not in table]:
        raise DatasetError(
            f"{root / name} lacks {len(without)} of the {len(files)} images of images.txt, such as number "
            f"{without[0]}: one of the two is truncated or belongs to another dataset"
        )


def _key(root: Path, file: str) -> str:
    return checked_key(file, str(root / "images.txt")).removesuffix(".jpg")


def _official_keys(root: Path, split: str, files: dict[str, str], ids: dict[str, str]) -> list[str]:
    table = _table(root, "train_test_split.txt")
    _check_ids(root, "train_test_split.txt", files, table)
    if unknown := set(table.values()) - set(_OFFICIAL.values()):
        raise DatasetError(f"{root / 'train_test_split.txt'} must mark images by 1 or 0, got {min(unknown)!r}")
    return [key for key, identity in ids.items() if table[identity] == _OFFICIAL[split]]


def _zeroshot_keys(root: Path, split: str, groups: dict[str, str]) -> list[str]:
    """Returns the keys of a class-disjoint split; raises `DatasetError` if both splits share a class."""
    halves = {}
    for name, file in _ZEROSHOT.items():
        halves[name] = read_lines("cub", root, file)
        if unknown := [key for key in halves[name] if key not in groups]:
            raise DatasetError(
                f"{root / file} names {len(unknown)} images that images.txt lacks, such as {unknown[0]!r}: it "
                "belongs to another dataset"
            )
    classes = [{groups[key] for key in keys} for keys in halves.values()]
    if shared := classes[0] & classes[1]:
        raise DatasetError(
            f"{root}: {' and '.join(_ZEROSHOT.values())} must share no class, but share {len(shared)}, such as "
            f"{min(shared)}"
        )
    return halves[split]
