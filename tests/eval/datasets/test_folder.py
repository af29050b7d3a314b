"""Any folder of images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import DatasetError, read_dataset
from dalle_zoo_eval.datasets.digests import remember

from dalle_zoo.data.captions import INVALID_CAPTION


def test_captions_are_read_from_text_files(make: Any) -> None:
    root = make.root / "mine"
    make.image(root / "b/one.png")
    make.image(root / "two.jpg")
    make.image(root / ".hidden/three.png")
    make.text(root / "b/one.txt", "a one", "", "one\ufffd")
    (root / "two.json").write_text(json.dumps({"caption": "a  two"}))
    first, second = read_dataset("folder", root, "all").items
    assert (first.key, first.captions, first.image) == ("b/one", ("a one", "one"), root / "b/one.png")
    assert (second.key, second.captions) == ("two", ("a two",))


def test_images_without_captions_are_all_used(make: Any) -> None:
    for name in ("a-1", "a", "a/b"):
        make.image(make.root / f"mine/{name}.png")
    benchmark = read_dataset("folder", make.root / "mine", "all")
    assert [(item.key, item.captions) for item in benchmark.items] == [("a", ()), ("a-1", ()), ("a/b", ())]
    assert not benchmark.skipped


def test_images_without_captions_among_others_are_skipped(make: Any) -> None:
    make.image(make.root / "mine/a.png")
    make.image(make.root / "mine/b.png")
    make.text(make.root / "mine/b.txt", "b")
    benchmark = read_dataset("folder", make.root / "mine", "all")
    assert [item.key for item in benchmark.items] == ["b"]
    assert benchmark.skipped == ("a: has no caption",)


def test_folder_without_images_raises(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DatasetError, match="holds no image"):
        read_dataset("folder", tmp_path, "all")


def test_captions_in_another_encoding_are_skipped(make: Any) -> None:
    root = make.root / "mine"
    for key, text in (("0", b"a cup"), ("1", "caf\u00e9".encode("latin-1")), ("2", "a cup\nof tea".encode("utf-16"))):
        make.image(root / f"{key}.png").with_suffix(".txt").write_bytes(text)
    benchmark = read_dataset("folder", root, "all")
    assert [item.key for item in benchmark.items] == ["0"]
    assert benchmark.skipped == (f"1: {INVALID_CAPTION}", f"2: {INVALID_CAPTION}")
    (root / "0.txt").unlink()
    with pytest.raises(DatasetError, match=r"all 3 entries were left out, .*1: a caption is not valid Unicode"):
        read_dataset("folder", root, "all")


def test_other_suffixes_and_names_are_read(make: Any) -> None:
    root = make.root / "mine"
    image = make.image(root / "a.jpg")
    for name in (b"b.jfif", b"c.JPE", b"caf\xe9.jpeg"):
        (root / os.fsdecode(name)).write_bytes(image.read_bytes())
    (root / "d.jpg").symlink_to("/nowhere")
    benchmark = read_dataset("folder", root, "all")
    assert [item.key for item in benchmark.items] == ["a", "b", "c", "caf\\udce9"]
    assert benchmark.skipped[0].startswith("d: its image")
    assert len(benchmark.sha256(make.root / "memo.json")) == 64
    remember(benchmark.image_files, make.root / "memo.json")
    assert benchmark.sha256(make.root / "memo.json") == benchmark.sha256()


def test_output_of_dalle_zoo_is_not_read(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    root = make.root / "mine"
    make.image(root / "a.png")
    for name in ("samples.png", "images/0.png"):
        make.image(root / "eval-folder" / name)
    for name in ("run.json", "report.html"):
        (root / "eval-folder" / name).write_text("{}")
    assert [item.key for item in read_dataset("folder", root, "all").items] == ["a"]
    assert "folders written by dalle-zoo (eval-folder)" in caplog.text
    with pytest.raises(ValueError, match="is the output of dalle-zoo"):
        read_dataset("folder", root / "eval-folder", "all")


def test_file_instead_of_folder_raises(make: Any) -> None:
    file = make.image(make.root / "a.png")
    with pytest.raises(
        DatasetError, match=r"expected a folder of images or of a dataset, got '.*a.png': it is a file"
    ):
        read_dataset("folder", file, "all")
