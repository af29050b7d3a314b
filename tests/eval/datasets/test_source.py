"""Captioned images of shards, folders and the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import load_image, read_dataset

from dalle_zoo.data.captions import INVALID_CAPTION, NO_CAPTION


def test_composed_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("styles: [3d, flat, cartoon]\nsamples: 100\n")
    dataset = read_dataset("source", None, f"{tmp_path}/few.yaml:val-styles")
    assert [item.key for item in dataset.items] == [f"single-{number}" for number in range(5)]
    assert load_image(dataset.items[0], "center", None).shape == (3, 64, 64)
    assert dataset.sha256() == read_dataset("source", None, f"{tmp_path}/few.yaml:val-styles").sha256()
    assert dataset.sha256() != read_dataset("source", None, f"{tmp_path}/few.yaml:val-concepts").sha256()


def test_folder_with_captions_is_read(make: Any) -> None:
    for key in ("a_flat", "b_blob"):
        make.text(make.image(make.root / f"data/{key}.png").with_suffix(".txt"), f"a {key}", "another")
    make.image(make.root / "data/captionless.png")
    dataset = read_dataset("source", None, str(make.root / "data"))
    assert [(item.key, item.concept, item.captions) for item in dataset.items] == [
        ("a_flat", "a", ("a a_flat", "another")),
        ("b_blob", "b", ("a b_blob", "another")),
    ]
    with pytest.raises(ValueError, match="does not exist"):
        read_dataset("source", None, str(make.root / "none"))


def test_unusable_samples_are_skipped(make: Any) -> None:
    for key in ("a_x", "b_x", "c_x"):
        make.text(make.image(make.root / f"data/{key}.png").with_suffix(".txt"), "a thing")
    (make.root / "data/b_x.json").write_text('{"caption": "half \\ud83d"}')
    (make.root / "data/c_x.txt").unlink()
    dataset = read_dataset("source", None, str(make.root / "data"))
    assert [item.key for item in dataset.items] == ["a_x"]
    assert dataset.skipped == (f"b_x: {INVALID_CAPTION}", f"c_x: {NO_CAPTION}")
