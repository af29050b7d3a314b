"""Decoding, cropping and scaling of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dalle_zoo_eval.datasets import DatasetError, Item, load_image, read_dataset
from dalle_zoo_eval.datasets.images import Crop, box_radius
from PIL import Image

from dalle_zoo.data import center_transform
from dalle_zoo.registry import UnknownNameError

WIDTH, HEIGHT = 20, 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An image whose pixels encode their coordinates: red is x, green is y."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    path = tmp_path / "a.png"
    Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8)).save(path)
    return path


def item(path: Path | None, box: tuple[float, float, float, float] | None = None) -> Item:
    return Item(key="a", image=path, captions=("a",), box=box)


def extent(pixels: torch.Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the crop, the last two exclusive."""
    (left, top), (right, bottom) = pixels[:2].amin((1, 2)).tolist(), pixels[:2].amax((1, 2)).tolist()
    assert tuple(pixels.shape) == (3, bottom - top + 1, right - left + 1)
    return left, top, right + 1, bottom + 1


def test_crops_without_size(path: Path) -> None:
    assert extent(load_image(item(path), "none", None)) == (0, 0, WIDTH, HEIGHT)
    assert extent(load_image(item(path), "center", None)) == (4, 0, 16, 12)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((8.0, 4.0, 4.0, 2.0), (7, 2, 13, 8)),  # center (10, 5), r = int(0.75 * 4) = 3
        ((8.0, 4.0, 5.0, 2.0), (7, 2, 13, 8)),  # r = int(3.75); the center is rounded down too
        ((8.9, 4.9, 4.9, 2.9), (7, 2, 13, 8)),  # AttnGAN reads boxes as integers
        ((0.0, 0.0, 4.0, 4.0), (0, 0, 5, 5)),  # clipped on the left and above
        ((14.0, 6.0, 6.0, 6.0), (13, 5, 20, 12)),  # clipped on the right and below
        ((0.0, 0.0, 20.0, 12.0), (0, 0, 20, 12)),  # larger than the image
        ((18.0, 10.0, 40.0, 2.0), (8, 0, 20, 12)),  # reaches beyond the image
    ],
)
def test_box_crops(path: Path, box: tuple[float, float, float, float], expected: tuple[int, int, int, int]) -> None:
    assert extent(load_image(item(path, box), "box", None)) == expected


def test_sizes(path: Path) -> None:
    complete = Image.open(path)
    assert torch.equal(load_image(item(path), "center", 8), center_transform(complete, 8))
    square = complete.crop((7, 2, 13, 8))
    assert torch.equal(load_image(item(path, (8, 4, 4, 2)), "box", 8), center_transform(square, 8))
    squeezed = load_image(item(path), "none", 8)
    assert squeezed.shape == (3, 8, 8)
    assert squeezed.dtype == torch.uint8
    assert squeezed[0, 4, 0] < 2  # both ends are still there
    assert squeezed[0, 4, -1] > WIDTH - 3


def test_exif_rotation_and_other_modes(tmp_path: Path, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.png"
    with Image.open(path) as image:
        image.save(turned, exif=exif)
    assert load_image(item(turned), "none", None).shape == (3, WIDTH, HEIGHT)
    Image.new("L", (4, 4), 7).save(tmp_path / "gray.png")
    assert set(load_image(item(tmp_path / "gray.png"), "none", None).flatten().tolist()) == {7}


def test_truncated_image_raises_with_its_key(make: Any) -> None:
    root = make.coco()
    broken = read_dataset("coco", root, "val2014").items[1]
    assert broken.image is not None
    broken.image.write_bytes(broken.image.read_bytes()[:200])
    with pytest.raises(DatasetError, match=rf"image .*{broken.key}\.jpg of {broken.key} cannot be used"):
        load_image(broken, "center", 8)
    broken.image.unlink()
    with pytest.raises(DatasetError, match=r"cannot be used: .*No such file"):
        load_image(broken, "center", 8)


def test_wrong_arguments_raise(path: Path) -> None:
    center: Any = "centered"
    with pytest.raises(UnknownNameError, match=r"unknown crop 'centered'\. Did you mean 'center'"):
        load_image(item(path), center, 8)
    with pytest.raises(DatasetError, match="size must be at least 1"):
        load_image(item(path), "none", 0)
    with pytest.raises(DatasetError, match="a has no image"):
        load_image(item(None), "none", 8)
    box: Crop = "box"
    with pytest.raises(DatasetError, match="a has no bounding box"):
        load_image(item(path), box, 8)
    with pytest.raises(DatasetError, match="must be in its image of 20 x 12 pixels"):
        load_image(item(path, (40.0, 2.0, 4.0, 4.0)), box, 8)
    with pytest.raises(DatasetError, match="of a is too small to be cropped"):
        load_image(item(path, (4.0, 2.0, 1.0, 1.0)), box, 8)
    assert (box_radius((4.0, 2.0, 1.9, 1.9)), box_radius((4.0, 2.0, 2.0, 1.0))) == (0, 1)
