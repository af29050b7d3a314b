"""Manifests of generated images and files of captions.

A manifest is a JSONL file next to its images with one object per image: ``image_path``, relative to the manifest, the
``prompt``, and perhaps ``id``, which the images of one prompt share. ``dalle-zoo generate --prompts`` writes it, and
EvalScope reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_zoo.files import FileError, parse_json, stays_inside
from dalle_zoo_eval.datasets.base import (
    DATASETS,
    DatasetError,
    EvalDataset,
    Item,
    clean_captions,
    read_dataset,
    usable,
)

MANIFEST = "manifest.jsonl"
"""File of ``dalle-zoo generate --prompts`` with one line per image."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a manifest."""

    id: str
    """Name of the prompt; the number of the line if it has none."""
    prompt: str
    """The prompt, with single spaces between words."""
    image: Path
    """Image file."""


def read_manifest(path: Path) -> list[Row]:
    """Reads a manifest.

    Raises:
        DatasetError: It cannot be read, a line is not as described above, or an image does not exist.
    """
    rows = []
    for number, values in read_jsonl(path):
        where = f"{path}, line {number}"
        name = values.get("image_path")
        if not isinstance(name, str) or not stays_inside(name):
            raise DatasetError(f"{where}: image_path must be a path inside the folder, got {name!r}")
        id_ = str(values.get("id", number))
        rows.append(Row(id=id_, prompt=_prompt(values, where), image=path.parent / name))
    missing = [row.image for row in rows if not row.image.is_file()]
    if missing:
        raise DatasetError(f"{path} lists images that do not exist, such as {missing[0]}: generate them again")
    return rows


def read_caption_file(path: Path) -> list[str]:
    """Reads captions: one per line of a text file, or the ``prompt`` of each object of a JSONL file.

    Raises:
        DatasetError: The file cannot be read, has no captions, or a line is not an object with a prompt.
    """
    if path.suffix == ".jsonl":
        captions = [_prompt(row, f"{path}, line {number}") for number, row in read_jsonl(path)]
    else:
        captions = [" ".join(line.split()) for line in _text(path).split("\n") if line.strip()]
    if not captions:
        raise DatasetError(f"{path} has no captions: expected one per line")
    return captions


@DATASETS.register("place")
def read_place(root: Path | None, split: str) -> EvalDataset:
    """Reads a folder of images, a manifest, or a folder with a manifest.

    Args:
        root: Not used: the location says all.
        split: The folder or file.

    Raises:
        DatasetError: There is no such place, or it has no image.
    """
    del root
    place = Path(split)
    manifest = place / MANIFEST if place.is_dir() else place
    if not manifest.is_file():
        return read_dataset("folder", place, "all")
    if manifest.suffix != ".jsonl":
        raise DatasetError(f"expected a folder of images or a manifest ({MANIFEST}), got the file {place}")
    items = [
        Item(
            key=f"{row.image.relative_to(manifest.parent).with_suffix('').as_posix()}",
            image=row.image,
            captions=clean_captions([row.prompt]),
        )
        for row in read_manifest(manifest)
    ]
    return usable("place:manifest", manifest.parent, items)


def _prompt(row: dict[str, Any], where: str) -> str:
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise DatasetError(f"{where}: prompt must be text, got {prompt!r}")
    return " ".join(prompt.split())


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Reads the objects of a JSONL file, each with the number of its line.

    Raises:
        DatasetError: The file cannot be read, or a line is not a JSON object.
    """
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    try:
        return [(number, parse_json(line.encode(), f"{path}, line {number}")) for number, line in lines]
    except FileError as error:
        raise DatasetError(str(error)) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not UTF-8: convert it to UTF-8 text") from None
