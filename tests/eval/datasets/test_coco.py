"""MS-COCO in the official layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import DatasetError, read_dataset
from dalle_zoo_eval.datasets.coco import SPLITS


def edit(root: Path, part: str, **changes: Any) -> None:
    """Changes fields of the first entry of a list of the caption file."""
    path = root / "annotations/captions_val2014.json"
    record = json.loads(path.read_text())
    record[part][0] |= changes
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("inside", ["", "images"])
@pytest.mark.parametrize("zipped", [False, True])
def test_official_layouts_are_read(make: Any, split: str, inside: str, zipped: bool) -> None:
    root = make.coco(split, inside=inside, zipped=zipped)
    benchmark = read_dataset("coco", root, split)
    prefix = f"COCO_{split}_" if "2014" in split else ""
    assert [item.key for item in benchmark.items] == [f"{prefix}{i:012d}" for i in (4, 9, 25)]
    first = benchmark.items[0]
    assert first.image == root / inside / split / f"{prefix}000000000004.jpg"
    assert first.captions == tuple(f"caption {c} of 4" for c in range(5))
    assert (first.box, first.concept) == (None, "")


def test_captions_have_no_line_breaks(make: Any) -> None:
    root = make.coco(captions={1: ["a dog \nruns. ", "", "a dog"]})
    assert read_dataset("coco", root, "val2014").items[0].captions == ("a dog runs.", "a dog")


def test_missing_caption_file_raises_with_present_files(make: Any) -> None:
    with pytest.raises(DatasetError, match=r"no annotations/captions_val2017\.json \(but captions_val2014\.json\)"):
        read_dataset("coco", make.coco(), "val2017")


def test_missing_images_raise(make: Any) -> None:
    root = make.coco()
    (root / "val2014").rename(root / "elsewhere")
    with pytest.raises(DatasetError, match=r"no folder of images val2014/ or images/val2014/"):
        read_dataset("coco", root, "val2014")


@pytest.mark.parametrize("zipped", [False, True])
def test_truncated_caption_file_raises(make: Any, zipped: bool) -> None:
    root = make.coco(zipped=zipped)
    path = next((root / "annotations").iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        DatasetError, match=r"captions_val2014\.json.* is not JSON or is truncated .*download it again"
    ):
        read_dataset("coco", root, "val2014")


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": [], "annotations": {}}'])
def test_unrelated_json_raises(make: Any, text: str) -> None:
    root = make.coco()
    (root / "annotations/captions_val2014.json").write_text(text)
    with pytest.raises(DatasetError, match="must hold the lists 'images' and 'annotations'"):
        read_dataset("coco", root, "val2014")


def test_file_of_boxes_raises(make: Any) -> None:
    root = make.coco()
    edit(root, "annotations", caption=None, bbox=[0, 0, 1, 1])
    with pytest.raises(DatasetError, match=r"entry 0 of 'annotations' must have the field 'caption' \(str\)"):
        read_dataset("coco", root, "val2014")


def test_image_outside_the_folder_raises(make: Any) -> None:
    root = make.coco()
    edit(root, "images", file_name="../../secret.jpg")
    with pytest.raises(DatasetError, match="expected a name inside the folder of the images"):
        read_dataset("coco", root, "val2014")


def test_captions_of_unlisted_image_are_skipped(make: Any) -> None:
    root = make.coco(captions={1: ["a"], 2: ["b"]})
    edit(root, "images", id=77)
    benchmark = read_dataset("coco", root, "val2014")
    assert [item.captions for item in benchmark.items] == [("b",)]
    assert set(benchmark.skipped) == {
        "image 1: has captions, but is not in the list of images",
        "COCO_val2014_000000000001: has no caption",
    }
