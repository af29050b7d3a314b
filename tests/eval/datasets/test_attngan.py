"""The layout of AttnGAN and DM-GAN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.datasets import DatasetError, UnsafePickleError, read_dataset


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_birds_are_read(make: Any) -> None:
    root = make.attngan(birds=True)
    first, second = read_dataset("attngan", root, "test").items
    assert first.key == "003.Crow/Crow_0001_31"
    assert first.image == root / "CUB_200_2011/images/003.Crow/Crow_0001_31.jpg"
    assert first.captions == ("A bird, called 003.Crow/Crow_0001_31.", "Two birds?")
    assert first.box == (5.0, 2.0, 4.0, 6.0)
    assert (first.concept, second.concept) == ("3", "3")
    assert [item.concept for item in read_dataset("attngan", root, "train").items] == ["1", "1", "2", "2"]


def test_coco_is_read(make: Any) -> None:
    root = make.attngan(birds=False)
    items = read_dataset("attngan", root, "test").items
    assert [item.key for item in items] == ["COCO_val2014_000000000003", "COCO_val2014_000000000007"]
    assert items[0].image == root / "images/COCO_val2014_000000000003.jpg"
    assert (items[0].box, items[0].concept) == (None, "")


@pytest.mark.parametrize("birds", [False, True])
def test_captions_are_read_from_pickle_without_text_folder(make: Any, birds: bool) -> None:
    root = make.attngan(birds=birds, text=False)
    for split in ("train", "test"):
        assert {i.captions for i in read_dataset("attngan", root, split).items} == {("a bird", "two bird")}


def test_captions_match_their_images(make: Any) -> None:
    root = make.attngan(birds=False, text=False)
    make.pickle(root / "captions.pickle", [[], [[1, 1], [1], [2], [2, 2, 0, 0]], {0: "<end>", 1: "x", 2: "y"}, {}])
    three, seven = read_dataset("attngan", root, "test").items  # filenames.pickle lists 7 first
    assert seven.captions == ("x x", "x")
    assert three.captions == ("y", "y y")


@pytest.mark.parametrize("name", ["captions.pickle", "test/filenames.pickle"])
def test_missing_pickles_raise_with_their_names(make: Any, name: str) -> None:
    root = make.attngan(birds=True)
    (root / name).unlink()
    with pytest.raises(DatasetError, match=f"there is no {name}"):
        read_dataset("attngan", root, "test")


def test_missing_images_raise(make: Any) -> None:
    root = make.attngan(birds=False)
    (root / "images").rename(root / "elsewhere")
    with pytest.raises(DatasetError, match="there is no images/"):
        read_dataset("attngan", root, "test")


@pytest.mark.parametrize("name", ["captions.pickle", "test/filenames.pickle", "test/class_info.pickle"])
def test_pickle_with_code_raises(make: Any, name: str) -> None:
    root, proof = make.attngan(birds=True, text=False), make.root / "ran"
    make.pickle(root / name, [Touch(proof)])
    with pytest.raises(UnsafePickleError, match=f"{name} is not opened: it must hold only plain data"):
        read_dataset("attngan", root, "test")
    assert not proof.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "must hold a list of train captions, .* got dict"),
        ([[], []], "must hold train captions, .* got 2 parts"),
        (
            [[], [[1]] * 3, {1: "a"}, {}],
            "equally many captions for each image of test, got 3 captions for 2 images",
        ),
        ([[], [], {1: "a"}, {}], "got 0 captions for 2 images"),
        ([[], [[1], [9]], {1: "a"}, {}], r"caption \[9\] has ids that its table of words lacks"),
        ([[], [1, 2], {1: "a"}, {}], "must hold a list of word ids, got int"),
    ],
)
def test_wrong_captions_raise(make: Any, value: object, message: str) -> None:
    root = make.attngan(birds=False, text=False)
    make.pickle(root / "captions.pickle", value)
    with pytest.raises(DatasetError, match=message):
        read_dataset("attngan", root, "test")


def test_inconsistent_lists_raise(make: Any) -> None:
    root = make.attngan(birds=True)
    make.pickle(root / "test/class_info.pickle", [3])
    with pytest.raises(DatasetError, match="must hold one class per image, got 1 for 2 images"):
        read_dataset("attngan", root, "test")
    make.pickle(root / "test/filenames.pickle", ["003.Crow/Crow_0001_99"])
    with pytest.raises(DatasetError, match=r"names 1 images that CUB_200_2011/images\.txt lacks"):
        read_dataset("attngan", root, "test")
    make.pickle(root / "test/filenames.pickle", ["../../secret"])
    with pytest.raises(DatasetError, match="expected a name inside the folder"):
        read_dataset("attngan", root, "test")
