"""Any folder of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.benchmarks import BenchmarkError, read_benchmark


def test_captions_beside_pictures(make: Any) -> None:
    root = make.root / "mine"
    make.picture(root / "b/one.png")
    make.picture(root / "two.jpg")
    make.picture(root / ".hidden/three.png")
    make.text(root / "b/one.txt", "a one", "", "one\ufffd")
    (root / "two.json").write_text(json.dumps({"caption": "a  two"}))
    first, second = read_benchmark("folder", root, "all").items
    assert (first.key, first.captions, first.image) == ("b/one", ("a one", "one"), root / "b/one.png")
    assert (second.key, second.captions) == ("two", ("a two",))


def test_pictures_alone(make: Any) -> None:
    for name in ("a-1", "a", "a/b"):
        make.picture(make.root / f"mine/{name}.png")
    benchmark = read_benchmark("folder", make.root / "mine", "all")
    assert [(item.key, item.captions) for item in benchmark.items] == [("a", ()), ("a-1", ()), ("a/b", ())]
    assert not benchmark.skipped


def test_pictures_without_captions_among_others_are_named(make: Any) -> None:
    make.picture(make.root / "mine/a.png")
    make.picture(make.root / "mine/b.png")
    make.text(make.root / "mine/b.txt", "b")
    benchmark = read_benchmark("folder", make.root / "mine", "all")
    assert [item.key for item in benchmark.items] == ["b"]
    assert benchmark.skipped == ("a: has no caption",)


def test_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(BenchmarkError, match="holds no picture"):
        read_benchmark("folder", tmp_path, "all")
