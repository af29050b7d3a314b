"""CUB-200-2011 with the class-disjoint split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import DatasetError, read_dataset
from dalle_zoo_eval.datasets.cub import SPLITS, read_boxes

from dalle_zoo.data.captions import INVALID_CAPTION


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_splits_have_expected_items(make: Any) -> None:
    root = make.cub()
    keys = {split: {item.key for item in read_dataset("cub", root, split).items} for split in SPLITS}
    assert keys["test"] == {"003.Crow/Crow_0001_31", "003.Crow/Crow_0002_32"}
    assert keys["train"] | keys["test"] == keys["train-official"] | keys["test-official"]
    assert not keys["train"] & keys["test"]
    assert not keys["train-official"] & keys["test-official"]
    assert {key[-1] for key in keys["train-official"]} == {"1"}  # odd numbers are marked 1


def test_item_has_image_captions_box_and_class(make: Any) -> None:
    root = make.cub()
    item = read_dataset("cub", root, "test").items[1]
    assert item.key == "003.Crow/Crow_0002_32"
    assert item.image == root / "images/003.Crow/Crow_0002_32.jpg"
    assert item.box == (6.0, 2.0, 4.0, 6.0)
    assert item.concept == "003.Crow"
    assert item.captions == ("a bird", *(f"bird 5 from side {side}" for side in range(9)))


def test_lost_characters_of_captions_are_spaces(make: Any) -> None:
    root = make.cub()
    make.text(root / "text_c10/003.Crow/Crow_0001_31.txt", "it has a 3\ufffd\ufffd bill", "", "black")
    assert read_dataset("cub", root, "test").items[0].captions == ("it has a 3 bill", "black")


def test_missing_or_unreadable_caption_file_is_skipped(make: Any) -> None:
    root = make.cub()
    (root / "text_c10/001.Tern/Tern_0001_11.txt").unlink()
    (root / "text_c10/001.Tern/Tern_0002_12.txt").write_bytes(b"a \xff bird\n")
    benchmark = read_dataset("cub", root, "train")
    assert len(benchmark.items) == 2
    assert benchmark.skipped == (
        "001.Tern/Tern_0001_11: has no caption",
        f"001.Tern/Tern_0002_12: {INVALID_CAPTION}",
    )


@pytest.mark.parametrize("name", ["images.txt", "classes.txt", "image_class_labels.txt", "zeroshot_train.txt"])
def test_missing_files_raise_with_their_names(make: Any, name: str) -> None:
    root = make.cub()
    (root / name).unlink()
    with pytest.raises(DatasetError, match=rf"there is no {name}\. The layout 'cub' has images\.txt"):
        read_dataset("cub", root, "test")


@pytest.mark.parametrize("name", ["images", "text_c10"])
def test_missing_folders_raise_with_their_names(make: Any, name: str) -> None:
    root = make.cub()
    (root / name).rename(root / "elsewhere")
    with pytest.raises(DatasetError, match=f"there is no {name}/"):
        read_dataset("cub", root, "test")


def test_official_split_works_without_zero_shot_lists(make: Any) -> None:
    root = make.cub()
    (root / "zeroshot_train.txt").unlink()
    (root / "zeroshot_test.txt").unlink()
    assert len(read_dataset("cub", root, "test-official").items) == 3
    (root / "train_test_split.txt").unlink()
    with pytest.raises(DatasetError, match=r"there is no train_test_split\.txt"):
        read_dataset("cub", root, "test-official")


def test_boxes_are_optional(make: Any) -> None:
    root = make.cub()
    (root / "bounding_boxes.txt").unlink()
    assert {item.box for item in read_dataset("cub", root, "test").items} == {None}


@pytest.mark.parametrize("name", ["bounding_boxes.txt", "image_class_labels.txt", "train_test_split.txt"])
def test_truncated_tables_raise(make: Any, name: str) -> None:
    root = make.cub()
    make.text(root / name, *(root / name).read_text().splitlines()[:4])
    with pytest.raises(DatasetError, match=rf"{name} lacks 2 of the 6 images of images\.txt, such as number 5"):
        read_dataset("cub", root, "test-official")


@pytest.mark.parametrize(
    "box", ["6 6.0 2.0 4.0", "6 a b c d", "6 1.0 1.0 0.0 4.0", "6 nan 1.0 2.0 2.0", "6 1 1 inf 2"]
)
def test_wrong_boxes_raise(make: Any, box: str) -> None:
    root = make.cub()
    change(root / "bounding_boxes.txt", "6 6.0 2.0 4.0 6.0", box)
    with pytest.raises(DatasetError, match="image 6 must have left, top, width and height"):
        read_boxes(root)


def test_malformed_tables_raise(make: Any) -> None:
    root = make.cub()
    change(root / "image_class_labels.txt", "2 1\n", "two 1\n")
    with pytest.raises(DatasetError, match="expected lines of a number and a value, got 'two 1'"):
        read_dataset("cub", root, "test")
    make.cub()
    change(root / "images.txt", "2 001.", "1 001.")
    with pytest.raises(DatasetError, match=r"images\.txt lists number 1 twice"):
        read_dataset("cub", root, "test")
    make.cub()
    change(root / "train_test_split.txt", "2 0", "2 7")
    with pytest.raises(DatasetError, match="must mark images by 1 or 0, got '7'"):
        read_dataset("cub", root, "test-official")
    make.cub()
    (root / "images.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"images\.txt must be a text file in UTF-8"):
        read_dataset("cub", root, "test")


def test_class_without_name_raises(make: Any) -> None:
    root = make.cub()
    change(root / "classes.txt", "3 003.Crow\n", "")
    with pytest.raises(DatasetError, match=r"classes\.txt lacks class 3"):
        read_dataset("cub", root, "test")


def test_inconsistent_splits_raise(make: Any) -> None:
    root = make.cub()
    change(root / "zeroshot_test.txt", "Crow_0001_31", "Crow_0001_99")
    with pytest.raises(DatasetError, match=r"names 1 images that images\.txt lacks, such as '003\.Crow/Crow_0001_99'"):
        read_dataset("cub", root, "test")
    make.cub()
    change(root / "zeroshot_train.txt", "002.Wren/Wren_0001_21", "003.Crow/Crow_0001_31")
    with pytest.raises(DatasetError, match=r"must share no class, but share 1, such as 003\.Crow"):
        read_dataset("cub", root, "test")


def test_name_outside_the_folder_raises(make: Any) -> None:
    root = make.cub()
    change(root / "images.txt", "001.Tern/Tern_0001_11.jpg", "../../secret.jpg")
    with pytest.raises(DatasetError, match="expected a name inside the folder"):
        read_dataset("cub", root, "test")
