"""Any folder of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import DatasetError, read_dataset


def test_captions_beside_images(make: Any) -> None:
    root = make.root / "mine"
    make.image(root / "b/one.png")
    make.image(root / "two.jpg")
    make.image(root / ".hidden/three.png")
    make.text(root / "b/one.txt", "a one", "", "one\ufffd")
    (root / "two.json").write_text(json.dumps({"caption": "a  two"}))
    first, second = read_dataset("folder", root, "all").items
    assert (first.key, first.captions, first.image) == ("b/one", ("a one", "one"), root / "b/one.png")
    assert (second.key, second.captions) == ("two", ("a two",))


def test_images_alone(make: Any) -> None:
    for name in ("a-1", "a", "a/b"):
        make.image(make.root / f"mine/{name}.png")
    benchmark = read_dataset("folder", make.root / "mine", "all")
    assert [(item.key, item.captions) for item in benchmark.items] == [("a", ()), ("a-1", ()), ("a/b", ())]
    assert not benchmark.skipped


def test_images_without_captions_among_others_are_named(make: Any) -> None:
    make.image(make.root / "mine/a.png")
    make.image(make.root / "mine/b.png")
    make.text(make.root / "mine/b.txt", "b")
    benchmark = read_dataset("folder", make.root / "mine", "all")
    assert [item.key for item in benchmark.items] == ["b"]
    assert benchmark.skipped == ("a: has no caption",)


def test_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DatasetError, match="holds no image"):
        read_dataset("folder", tmp_path, "all")
