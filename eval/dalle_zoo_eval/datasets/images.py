"""Decoding, cropping and scaling of reference images."""

from __future__ import annotations

import io
import warnings
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.data.decoding import CorruptImageError, decode_image, read_image
from dalle_zoo.data.transforms import center_transform
from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.choices import Crop
from dalle_zoo_eval.datasets.base import DatasetError, Item


def load_image(item: Item, crop: Crop, size: int | None) -> Tensor:
    """Decodes the image of an item, upright and in RGB.

    | crop | without a size | with a size |
    |---|---|---|
    | ``none`` | the complete image | squeezed to a square |
    | ``center`` | the square in its center | that square, resized |
    | ``box`` | the square around its bounding box | the square in the center of that, resized |

    The square of ``box`` has one and a half times the longer side of the box and is clipped to the image, so the
    result may not be square. Resizing is Lanczos, as in `dalle_zoo.data.center_transform`.

    Args:
        item: Item of a dataset.
        crop: Crop of the image.
        size: Side of the result, pixels; None leaves it unscaled.

    Returns:
        Pixels, uint8 (3, H, W).

    Raises:
        UnknownNameError: There is no such crop.
        DatasetError: The image is missing or damaged, or its bounding box is missing or outside of it.

    Example:
        >>> item = Item(key="strip", image=b"P6 2 1 255 abcdef", captions=())  # 2 x 1 pixels
        >>> load_image(item, "none", None).shape, load_image(item, "center", 4).shape
        (torch.Size([3, 1, 2]), torch.Size([3, 4, 4]))
    """
    if crop not in get_args(Crop):
        raise UnknownNameError(suggest("crop", crop, get_args(Crop)))
    if size is not None and size < 1:
        raise DatasetError(f"size must be at least 1, or None, got {size}")
    image = _decode(item)
    if crop != "box":
        return fit_image(image, crop, size)
    image = _box_crop(item, image)
    return _pixels(image) if size is None else center_transform(image, size)


def fit_image(image: Image.Image, crop: Crop, size: int | None) -> Tensor:
    """Crops and scales a decoded image that has no bounding box, by ``none`` or ``center`` as in `load_image`."""
    if crop == "none":
        return _pixels(image if size is None else image.resize((size, size), Image.Resampling.LANCZOS))
    return center_transform(image, min(image.size) if size is None else size)


def _decode(item: Item) -> Image.Image:
    if item.image is None:
        raise DatasetError(f"{item.key} has no image: its dataset holds only captions")
    try:
        return decode_image(item.image if isinstance(item.image, bytes) else read_image(item.image))
    except CorruptImageError as error:
        raise DatasetError(f"image {_place(item)} of {item.key} cannot be used: {error}") from error


def _place(item: Item) -> str:
    return "" if isinstance(item.image, bytes) else str(item.image)


def stored_size(item: Item) -> tuple[int, int]:
    """Returns width and height from the header of an image file, before any rotation, without decoding it.

    Raises:
        DatasetError: The file is missing or is not an image.
    """
    assert item.image is not None
    file = io.BytesIO(item.image) if isinstance(item.image, bytes) else item.image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `decode_image` has a limit of its own
        try:
            with Image.open(file) as image:
                return image.size
        except (OSError, Image.DecompressionBombError) as error:
            raise DatasetError(f"image {_place(item)} of {item.key} cannot be used: {error}") from error


def box_radius(box: tuple[float, float, float, float]) -> int:
    """Returns half the side of the square around a bounding box, pixels; 0 if the box is too small to be cropped."""
    return int(0.75 * max(int(box[2]), int(box[3])))


def _box_crop(item: Item, image: Image.Image) -> Image.Image:
    """Crops the square around a bounding box, rounded as in AttnGAN's code/datasets.py (`get_imgs`)."""
    if item.box is None:
        raise DatasetError(
            f"{item.key} has no bounding box: is there a bounding_boxes.txt? Otherwise use another crop"
        )
    left, top, width, height = map(int, item.box)
    r = box_radius(item.box)
    if r < 1:
        raise DatasetError(f"bounding box {item.box} of {item.key} is too small to be cropped: correct it")
    x, y = (2 * left + width) // 2, (2 * top + height) // 2
    edges = max(x - r, 0), max(y - r, 0), min(x + r, image.width), min(y + r, image.height)
    if edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise DatasetError(
            f"bounding box {item.box} of {item.key} must be in its image of {image.width} x {image.height} pixels"
        )
    return image.crop(edges)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
