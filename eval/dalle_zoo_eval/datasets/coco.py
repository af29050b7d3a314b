"""MS-COCO captions of 2014 and 2017 in the official layout.

```
annotations/captions_val2014.json   or captions_val2014.json.gz
val2014/COCO_val2014_000000000042.jpg   or images/val2014/...
```

Reference: Microsoft COCO: Common Objects in Context (Lin et al., 2014); Microsoft COCO Captions (Chen et al., 2015).
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from dalle_zoo.plain_data import PlainDataError, json_value
from dalle_zoo_eval.datasets.base import (
    DATASETS,
    DatasetError,
    EvalDataset,
    Item,
    check_split,
    checked_key,
    clean_captions,
    missing,
    usable,
)

MAX_BYTES = 2**30
"""Maximum size of a caption file, bytes; the largest one, of the training images, has 90 MB."""
SPLITS = ("train2014", "val2014", "train2017", "val2017")


@DATASETS.register(
    "coco",
    mark="annotations",
    files="annotations/captions_SPLIT.json (or .json.gz) and the images in SPLIT/ or images/SPLIT/",
)
def read_coco(root: Path | None, split: str) -> EvalDataset:
    """Reads a split; the keys are the names of the image files without suffix.

    Args:
        root: Folder with ``annotations/`` and the images.
        split: One of `SPLITS`.

    Raises:
        UnknownNameError: There is no such split.
        DatasetError: Files are missing or damaged, or there is no image of the split.
    """
    check_split("coco", split, SPLITS)
    assert root is not None  # `read_dataset` has checked it
    path = _annotation_file(root, split)
    folder = next((p for p in (root / split, root / "images" / split) if p.is_dir()), None)
    if folder is None:
        raise missing("coco", root, f"folder of images {split}/ or images/{split}/")
    images, annotations = _annotations(path)

    captions: dict[int, list[str]] = {}
    for number, entry in enumerate(annotations):
        image = _field(entry, "image_id", int, path, "annotations", number)
        text = _field(entry, "caption", str, path, "annotations", number)
        captions.setdefault(image, []).append(text)
    items = []
    for number, entry in enumerate(images):
        file = checked_key(_field(entry, "file_name", str, path, "images", number), str(path))
        image = _field(entry, "id", int, path, "images", number)
        texts = clean_captions(captions.pop(image, ()))
        key = PurePosixPath(file).with_suffix("").as_posix()
        items.append(Item(key=key, image=folder / file, captions=texts))
    skipped = [f"image {image}: has captions, but is not in the list of images" for image in sorted(captions)]
    return usable(f"coco:{split}", root, items, skipped)


def _annotation_file(root: Path, split: str) -> Path:
    names = [f"annotations/captions_{split}.json{ending}" for ending in ("", ".gz")]
    for name in names:
        if (root / name).is_file():
            return root / name
    present = sorted(p.name for p in (root / "annotations").glob("captions_*.json*"))
    raise missing("coco", root, names[0] + (f" (but {', '.join(present)})" if present else ""))


def _annotations(path: Path) -> tuple[list[Any], list[Any]]:
    """Returns the lists ``images`` and ``annotations`` of a caption file."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # A small archive can decompress to any number of bytes.
            record = json_value(file.read(MAX_BYTES + 1), max_bytes=MAX_BYTES)
    except (PlainDataError, EOFError, OSError, zlib.error) as error:
        raise DatasetError(f"{path} is not JSON or is truncated ({error}): download it again") from None
    images, annotations = (record.get(k) if isinstance(record, dict) else None for k in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise DatasetError(
            f"{path} must hold the lists 'images' and 'annotations', as the official captions_*.json do"
        )
    return images, annotations


def _field(entry: Any, name: str, kind: type, path: Path, part: str, number: int) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        raise DatasetError(
            f"{path}: entry {number} of {part!r} must have the field {name!r} ({kind.__name__}), got {value!r}: it "
            "is not a caption file or is damaged"
        )
    return value
