"""Contract of all layouts: names, digests, skipped entries, and folders of another layout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import DATASETS, DatasetError, EvalDataset, Item, base, read_dataset
from dalle_zoo_eval.datasets.base import DatasetSpec, checked_key, clean_captions, usable

from dalle_zoo.registry import SpecRegistry, UnknownNameError

SPLITS = {"coco": "val2014", "cub": "test", "attngan": "test", "folder": "all"}
MAKERS: dict[str, Callable[[Any], Path]] = {
    "coco": lambda make: make.coco(),
    "cub": lambda make: make.cub(),
    "attngan": lambda make: make.attngan(birds=True),
    "folder": lambda make: make.image(make.root / "folder/a.png").parent,
}


def test_every_layout_is_tested() -> None:
    assert set(DATASETS) == {*MAKERS, "source", "composition", "place"}  # each has a test of its own


@pytest.mark.parametrize("layout", MAKERS)
def test_every_layout_is_read(make: Any, layout: str) -> None:
    root = MAKERS[layout](make)
    benchmark = read_dataset(layout, root, SPLITS[layout])
    assert benchmark.name == f"{layout}:{SPLITS[layout]}"
    assert benchmark.root == root
    assert not benchmark.skipped
    keys = [item.key for item in benchmark.items]
    assert keys == sorted(set(keys))
    assert all(item.image is not None and item.image.is_file() for item in benchmark.items)
    assert benchmark.sha256() == read_dataset(layout, root, SPLITS[layout]).sha256()
    with pytest.raises(UnknownNameError, match=f"unknown split of {layout} 'tset'"):
        read_dataset(layout, root, "tset")


def test_unknown_layout_and_missing_folder_raise(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown evaluation dataset 'cocoo'. Did you mean 'coco'\?"):
        read_dataset("cocoo", tmp_path, "val2014")
    with pytest.raises(DatasetError, match="there is no such folder"):
        read_dataset("coco", tmp_path / "nowhere", "val2014")


@pytest.mark.parametrize("asked", ["coco", "cub", "attngan"])
@pytest.mark.parametrize("given", ["coco", "cub", "attngan"])
def test_another_layout_is_recognized(make: Any, asked: str, given: str) -> None:
    root = MAKERS[given](make)
    if asked == given:
        read_dataset(asked, root, SPLITS[asked])
        return
    with pytest.raises(DatasetError) as caught:
        read_dataset(asked, root, SPLITS[asked])
    assert f"The layout '{asked}' has " in str(caught.value)
    assert str(caught.value).endswith(f"The folder looks like the layout '{given}'.")


def test_folder_one_level_below_is_suggested(make: Any) -> None:
    make.cub()
    with pytest.raises(DatasetError, match=r"Its folder CUB_200_2011 looks like the layout 'cub'"):
        read_dataset("cub", make.root, "test")


def test_registered_layout_describes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = SpecRegistry("evaluation dataset", group="example.datasets", spec=DatasetSpec)
    monkeypatch.setattr(base, "DATASETS", registry)

    @registry.register("tree", files="a tree")
    @registry.register("table", mark="captions.tsv", files="captions.tsv and its images")
    def read_table(root: Path | None, split: str) -> EvalDataset:
        raise AssertionError("the folder is checked first")

    with pytest.raises(DatasetError, match=r"the folder of the dataset \(table\) is needed"):
        read_dataset("table", None, "all")
    error = base.missing("table", tmp_path, "captions.tsv")
    assert str(error).endswith("there is no captions.tsv. The layout 'table' has captions.tsv and its images.")
    (tmp_path / "captions.tsv").touch()
    assert "looks like the layout 'table'" in str(base.missing("tree", tmp_path, "tree"))


@pytest.mark.parametrize("layout", ["coco", "cub", "attngan"])
def test_empty_folder_raises_with_layout(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DatasetError, match=rf"there is no .*The layout '{layout}' has .*\.$"):
        read_dataset(layout, tmp_path, SPLITS[layout])


def test_digest_depends_on_every_part(toy: EvalDataset) -> None:
    first = toy.items[0]
    assert first.image is not None
    digests = {toy.sha256()}
    changes: list[dict[str, Any]] = [
        {"key": "x"}, {"captions": ("x",)}, {"box": (0.0, 0.0, 1.0, 1.0)}, {"concept": "x"}, {"image": None},
        {"image": b"bytes"}, {"targets": {"count": 2}},
    ]  # fmt: skip
    for change in changes:
        digests.add(replace(toy, items=(replace(first, **change), *toy.items[1:])).sha256())
    first.image.write_bytes(b"of another size")
    digests.add(toy.sha256())
    first.image.write_bytes(b"of AnOtHeR size")  # of the same size
    digests.add(toy.sha256())
    assert len(digests) == len(changes) + 3


def test_digest_does_not_depend_on_location(make: Any) -> None:
    first = read_dataset("coco", make.coco(name="one"), "val2014")
    second = read_dataset("coco", make.coco(name="two", inside="images", zipped=True), "val2014")
    assert first.sha256() == second.sha256()


def test_skipped_entries_are_listed_and_counted(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = make.coco(captions={1: ["a"], 2: [" ", "\n"], 3: ["c"], 4: ["d"], 5: ["e"]})
    images = root / "val2014"
    (images / "COCO_val2014_000000000003.jpg").unlink()
    (images / "COCO_val2014_000000000004.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        benchmark = read_dataset("coco", root, "val2014")
    assert [item.key[-1] for item in benchmark.items] == ["1", "5"]
    no_caption, absent, empty = benchmark.skipped
    assert no_caption == "COCO_val2014_000000000002: has no caption"
    assert absent.startswith("COCO_val2014_000000000003: its image ")
    assert absent.endswith("000000000003.jpg is missing")
    assert empty.endswith("000000000004.jpg is empty")
    assert "3 of 5 entries left out, such as COCO_val2014_000000000002: has no caption" in caplog.text


def test_no_usable_image_raises(make: Any) -> None:
    root = make.coco()
    for path in (root / "val2014").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"no usable image: all 3 entries were left out, such as COCO_.*missing"):
        read_dataset("coco", root, "val2014")


def test_equal_keys_raise(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    item = Item(key="a", image=tmp_path / "a.png", captions=("a",))
    with pytest.raises(DatasetError, match="lists the image 'a' twice"):
        usable("toy:all", tmp_path, [item, item])


@pytest.mark.parametrize("key", ["../a", "a/../../b", "/etc/a", "a\0b", "", None, 3, "..\\a"])
def test_keys_outside_the_folder_raise(key: object) -> None:
    with pytest.raises(DatasetError, match=r"list\.txt: expected"):
        checked_key(key, "list.txt")


def test_captions_are_cleaned() -> None:
    assert clean_captions(["a\ncat\t on  a mat. ", "", " \n", "one\ufffd\ufffdcat"]) == ("a cat on a mat.", "one cat")
