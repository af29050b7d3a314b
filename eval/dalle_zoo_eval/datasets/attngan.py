"""Birds and MS-COCO in the layout of AttnGAN, which DM-GAN also uses.

```
captions.pickle          train captions, test captions, words by id, ids by word
<split>/filenames.pickle class_info.pickle          keys; class of each key, for birds
CUB_200_2011/images.txt  bounding_boxes.txt  images/<key>.jpg    birds
images/<key>.jpg                                                 MS-COCO
text/<key>.txt           captions, one per line
```

``captions.pickle`` holds a fixed number of captions per image, reduced to lower-case words. If ``text/`` has been
unpacked, its original captions are used instead.

Reference: AttnGAN (Xu et al., 2018), code/datasets.py; DM-GAN (Zhu et al., 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle_zoo_eval.datasets.base import (
    DATASETS,
    DatasetError,
    EvalDataset,
    Item,
    captions_beside,
    check_split,
    checked_key,
    missing,
    usable,
)
from dalle_zoo_eval.datasets.cub import read_boxes
from dalle_zoo_eval.datasets.safe_pickle import load_plain

SPLITS = ("train", "test")
_BIRDS = "CUB_200_2011"
_END = 0
"""Word id that ends a caption."""


@DATASETS.register(
    "attngan",
    mark="captions.pickle",
    files="captions.pickle, SPLIT/filenames.pickle and images/KEY.jpg, or, for birds, CUB_200_2011/images.txt, "
    "CUB_200_2011/bounding_boxes.txt and CUB_200_2011/images/KEY.jpg; optionally SPLIT/class_info.pickle and "
    "text/KEY.txt",
)
def read_attngan(root: Path | None, split: str) -> EvalDataset:
    """Reads a split; the keys are those of filenames.pickle.

    Args:
        root: Folder with captions.pickle.
        split: ``train`` or ``test``.

    Raises:
        UnknownNameError: There is no such split.
        DatasetError: Files are missing, damaged or contradict each other, or there is no image of the split.
        UnsafePickleError: A pickle holds more than plain data.
    """
    check_split("attngan", split, SPLITS)
    assert root is not None  # `read_dataset` has checked it
    for name in ("captions.pickle", f"{split}/filenames.pickle"):
        if not (root / name).is_file():
            raise missing("attngan", root, name)
    path = root / split / "filenames.pickle"
    keys = [checked_key(key, str(path)) for key in _list(load_plain(path), path, "keys")]
    birds = (root / _BIRDS).is_dir()
    boxes = read_boxes(root / _BIRDS) if birds else {}
    if birds and (unknown := [key for key in keys if key not in boxes]):
        raise DatasetError(
            f"{path} names {len(unknown)} images that {_BIRDS}/images.txt lacks, such as {unknown[0]!r}"
        )
    images = root / _BIRDS / "images" if birds else root / "images"
    if not images.is_dir():
        raise missing("attngan", root, f"{images.relative_to(root)}/")
    if (root / "text").is_dir():
        captions = [captions_beside(root / "text" / f"{key}.txt") for key in keys]
    else:
        captions = _pickled_captions(root / "captions.pickle", split, len(keys))
    items = [
        Item(key=key, image=images / f"{key}.jpg", captions=texts, box=boxes.get(key), concept=group)
        for key, texts, group in zip(keys, captions, _groups(root, split, len(keys)), strict=True)
    ]
    return usable(f"attngan:{split}", root, items)


def _pickled_captions(path: Path, split: str, num_keys: int) -> list[tuple[str, ...]]:
    """Returns the captions of every key, as words separated by spaces."""
    parts = _list(load_plain(path), path, "train captions, test captions and two tables of words")
    if len(parts) != 4 or not isinstance(parts[2], dict):
        raise DatasetError(
            f"{path} must hold train captions, test captions, words by id and ids by word, got {len(parts)} parts"
        )
    captions, words = _list(parts[SPLITS.index(split)], path, "captions"), parts[2]
    if not num_keys or not captions or len(captions) % num_keys:
        raise DatasetError(
            f"{path} must hold equally many captions for each image of {split}, got {len(captions)} captions for "
            f"{num_keys} images"
        )
    each = len(captions) // num_keys
    texts = [_sentence(caption, words, path) for caption in captions]
    return [tuple(text for text in texts[start : start + each] if text) for start in range(0, len(texts), each)]


def _sentence(ids: Any, words: dict[Any, Any], path: Path) -> str:
    found: list[Any] = [words.get(identity) for identity in _list(ids, path, "word ids") if identity != _END]
    if not all(isinstance(word, str) for word in found):
        raise DatasetError(f"{path}: caption {ids!r} has ids that its table of words lacks")
    return " ".join(found)


def _groups(root: Path, split: str, num_keys: int) -> Sequence[str]:
    """Returns the class number of every key; empty for MS-COCO."""
    path = root / split / "class_info.pickle"
    if not path.is_file():
        return [""] * num_keys
    classes = _list(load_plain(path), path, "class numbers")
    if len(classes) != num_keys:
        raise DatasetError(f"{path} must hold one class per image, got {len(classes)} for {num_keys} images")
    return [str(number) for number in classes]


def _list(value: object, path: Path, of: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise DatasetError(f"{path} must hold a list of {of}, got {type(value).__name__}")
    return list(value)
