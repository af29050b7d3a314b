"""Training images of shards and folders, in any order, including unreadable ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval import training_images
from dalle_zoo_eval.training_images import UNREADABLE, TrainingImages

COUNT = 11


@pytest.fixture
def folder(make: Any) -> Path:
    for number in range(COUNT):
        make.image(make.root / "images" / f"{number:02}.png", (12, 10), seed=number)
    root: Path = make.root / "images"
    return root


def shards(folder: Path, *ends: int) -> str:
    """Writes the images to shards that end after the given numbers."""
    paths = sorted(folder.iterdir())
    for number, (start, end) in enumerate(zip([0, *ends], [*ends, COUNT], strict=False)):
        with tarfile.open(folder.parent / f"{number}.tar", "w") as archive:
            for path in paths[start:end]:
                archive.add(path, path.name)
    return str(folder.parent / f"{{0..{len(ends)}}}.tar")


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_shards_and_folder_give_equal_images(folder: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_images, "BLOCK", block)
    one, other = TrainingImages(str(folder), "center", 8), TrainingImages(shards(folder, 4, 9), "center", 8)
    assert len(one) == len(other) == COUNT
    for indices in (range(4, 8), range(8, COUNT), range(4)):  # as several processes ask for them
        for a, b in zip(one.load(indices).images[1], other.load(indices).images[1], strict=True):
            assert torch.equal(a, b)
            assert a.shape == (3, 8, 8)
    assert torch.equal(one.load([7]).images[1][0], other.load([7]).images[1][0])
    assert one.key(7) == other.key(7) == "07"
    assert one.identity != other.identity


def test_unreadable_images_are_marked(folder: Path) -> None:
    (folder / "03.png").write_bytes(b"cut")
    shown = TrainingImages(str(folder), "center", 8).load(range(2, 5))
    assert shown.chosen == {1: [0, UNREADABLE, 0]}
    assert not shown.images[1][1].any()


def test_truncated_shard_retains_sample_numbers(folder: Path) -> None:
    pattern = shards(folder, 6)
    complete = TrainingImages(pattern, "center", 8)
    last = complete.load([COUNT - 1]).images[1][0]
    first = folder.parent / "0.tar"
    data = first.read_bytes()
    first.write_bytes(data[: len(data) // 2])
    truncated = TrainingImages(pattern, "center", 8)
    shown = truncated.load(range(len(truncated)))
    assert len(truncated) < COUNT
    assert torch.equal(shown.images[1][-1], last)


def test_missing_location_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        TrainingImages(str(tmp_path / "none"), "center", 8)


def test_unlisted_records_do_not_shift_others(folder: Path, make: Any) -> None:
    """Captions without images take no index, and unreadable images retain theirs."""
    members = {f"{number:02}.png": (folder / f"{number:02}.png").read_bytes() for number in range(4)}
    members |= {"01.json": b'{"captions": ["half \\ud83d", "whole"]}', "stray.txt": b"x", "02.png": b"cut"}
    path = folder.parent / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in sorted(members):
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            archive.addfile(info, io.BytesIO(members[name]))
    training = TrainingImages(str(path), "center", 8)
    assert training.load(range(4)).chosen == {1: [0, 0, UNREADABLE, 0]}
    assert [training.key(index) for index in range(4)] == ["00", "01", "02", "03"]
