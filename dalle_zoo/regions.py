"""Regions of an image that generation keeps: pixels of a mask to cells of the code grid."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.images import from_pil, to_rgb
from dalle_zoo.sampling import SAMPLE
from dalle_zoo.values import as_integer, check_type

# H W pixels, h w code grid


def fit_image(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Crops an image to an aspect ratio at its center, and resizes it.

    Args:
        image: Image of any mode and size.
        size: Height and width of the result, pixels.

    Returns:
        Pixels in [0, 1], (3, H, W).

    Example:
        >>> fit_image(Image.new("RGB", (300, 200)), (64, 64)).shape
        torch.Size([3, 64, 64])
    """
    rgb = to_rgb(image)  # upright, which may exchange width and height
    return from_pil(rgb.resize((size[1], size[0]), Image.Resampling.LANCZOS, crop_box(rgb.size, size)))


def crop_box(image: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The centered crop that `fit_image` takes: left, top, right and bottom in pixels of the image.

    Args:
        image: Width and height of the image.
        size: Height and width of the result.

    Example:
        >>> crop_box((300, 200), (64, 64))
        (50.0, 0.0, 250.0, 200.0)
    """
    width, height = image
    scale = min(width / size[1], height / size[0])
    # Pillow refuses a box that rounding moved beyond the image.
    wide, high = min(scale * size[1], width), min(scale * size[0], height)
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def cells_to_sample(mask: Image.Image | Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Cells of the code grid that a mask touches.

    Args:
        mask: Image whose white pixels are generated again, cropped like the image, where transparent pixels are
            white; or a tensor (H, W) of bool or of values in [0, 1]. A value of at least one half counts as white.
        size: Height and width of the model's images, pixels.
        grid: Height and width of the code grid.

    Returns:
        bool (h, w), True where any pixel of the cell is white.

    Raises:
        ValueError: The mask is a tensor of another shape.

    Example:
        >>> mask = Image.new("L", (64, 64))
        >>> mask.paste(255, (32, 0, 64, 20))  # left, top, right, bottom
        >>> cells_to_sample(mask, size=(64, 64), grid=(4, 4)).int()
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1],
                [0, 0, 0, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    if isinstance(mask, Tensor):
        if tuple(mask.shape) != size:
            raise ValueError(f"mask must be a PIL image or have shape {size}, got {tuple(mask.shape)}")
        white = (mask.float() >= 0.5).cpu().numpy()
    else:
        white = np.asarray(to_rgb(mask).convert("L")) >= 128
    left, top, right, bottom = crop_box((white.shape[1], white.shape[0]), size)
    rows, columns = _spans(top, bottom, grid[0], white.shape[0]), _spans(left, right, grid[1], white.shape[1])
    return torch.tensor([[bool(white[row, column].any()) for column in columns] for row in rows])


def _spans(start: float, stop: float, count: int, limit: int) -> list[slice]:
    """Pixels that each of ``count`` equal parts of an interval touches; at least one each."""
    step = (stop - start) / count
    spans = []
    for number in range(count):
        first = min(math.floor(start + number * step + 1e-6), limit - 1)
        last = max(math.ceil(start + (number + 1) * step - 1e-6), first + 1)
        spans.append(slice(max(first, 0), last))
    return spans


def shift_image(image: Image.Image, right: int, down: int) -> tuple[Image.Image, Image.Image]:
    """Moves an image inside its frame, for out-painting: what moves out is lost, what becomes empty is generated.

    Args:
        image: The image.
        right: Pixels to move it to the right; negative to the left.
        down: Pixels to move it down; negative up.

    Returns:
        The moved image, gray where it is empty, and the mask, white there. Both have the size of the image.

    Raises:
        ValueError: Nothing of the image would remain.

    Example:
        >>> moved, mask = shift_image(Image.new("RGB", (64, 64)), 16, 0)
        >>> moved.size, mask.getpixel((15, 0)), mask.getpixel((16, 0))
        ((64, 64), 255, 0)
    """
    check_type("image", image, Image.Image, "a PIL image")
    right, down = as_integer("right", right), as_integer("down", down)
    image = to_rgb(image)  # upright
    if abs(right) >= image.width or abs(down) >= image.height:
        raise ValueError(f"a shift of ({right}, {down}) pixels leaves nothing of an image of {image.size}")
    moved = Image.new("RGB", image.size, (128, 128, 128))
    moved.paste(image, (right, down))
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (max(right, 0), max(down, 0), image.width + min(right, 0), image.height + min(down, 0)))
    return moved, mask


def following(given: Tensor) -> Tensor:
    """Kept cells that come after the first sampled cell in raster order: codes (…, h, w) to bool (…, h, w).

    Example:
        >>> following(torch.tensor([[5, SAMPLE], [SAMPLE, 7]])).int()
        tensor([[0, 0],
                [0, 1]], dtype=torch.int32)
    """
    flat = given.flatten(-2)
    return ((flat == SAMPLE).cummax(-1).values & (flat != SAMPLE)).view(given.shape)


def ranks_by_likelihood(given: Tensor | None) -> bool:
    """Whether kept cells follow a sampled one, so that their likelihood tells good candidates from bad ones.

    Example:
        >>> top, bottom = torch.tensor([[5, 6], [SAMPLE, SAMPLE]]), torch.tensor([[SAMPLE, SAMPLE], [5, 6]])
        >>> ranks_by_likelihood(top), ranks_by_likelihood(bottom)
        (False, True)
    """
    return given is not None and bool(following(given).any())
