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


@DATASETS.register("folder", files="images, optionally with captions of the same name in .txt files")
def read_folder(root: Path | None, split: str) -> EvalDataset:
    """Reads the images of a folder and its subfolders, with keys and captions as in `dalle_zoo.data.FolderSource`.

    If no image has captions, all images are used: they can be evaluated, but no images can be generated from them. If
    some images have captions, the others are left out.

    Args:
        root: The folder.
        split: ``all``; to read a part, give its subfolder.

    Raises:
        UnknownNameError: There is no such split.
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
            f"{root} holds no image ({source.selection.describe()}): give a folder with .jpg, .png or other images"
        )
    return usable("folder:all", root, items, needs_captions=any(item.captions for item in items))
