"""Any folder of images, with or without captions."""

from __future__ import annotations

from pathlib import Path

from dalle_zoo.data.captions import read_captions
from dalle_zoo.data.folder import FolderSource
from dalle_zoo_eval.datasets.base import (
    DATASETS,
    DatasetError,
    EvalDataset,
    Item,
    check_split,
    clean_captions,
    usable,
)

SPLITS = ("all",)


@DATASETS.register("folder", files="images, perhaps with captions of the same name in .txt files")
def read_folder(root: Path | None, split: str) -> EvalDataset:
    """Reads the images below a folder; keys and captions as `dalle_zoo.data.FolderSource`.

    Where no image has captions, all are kept: they can be measured, but nothing can be sampled from them. Where some
    have, the others are left out.

    Args:
        root: The folder.
        split: ``all``; to read a part, name its folder.

    Raises:
        UnknownNameError: Another split.
        DatasetError: There is no image.
    """
    check_split("folder", split, SPLITS)
    assert root is not None  # `read_dataset` has checked it
    source = FolderSource(root)
    items = [
        Item(key=key, image=root / path, captions=clean_captions(read_captions(*source.read_texts(path))))
        for key, path in source.images.items()
    ]
    if not items:
        raise DatasetError(
            f"{root} holds no image ({source.selection.describe()}): name a folder with .jpg, .png or other images"
        )
    return usable("folder:all", root, items, needs_captions=any(item.captions for item in items))
