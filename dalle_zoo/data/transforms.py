"""Crops and resizes: of the two stages (Listings 1 and 2 of the paper) and of evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.registry import Registry
from dalle_zoo.seeds import seeded_rng

# h w size of the image, s side of the square crop, t side after reduction, all in pixels

Pixels = npt.NDArray[np.uint8]
Transform = Callable[[Image.Image, int, random.Random], Tensor]
"""(RGB image, size, generator) to uint8 pixels (3, size, size)."""

TRANSFORMS: Registry[Transform] = Registry("image transform", group="dalle_zoo.transforms")


def sample_rng(seed: int, key: str, variant: int) -> random.Random:
    """Returns the generator for the crop of one variant of one sample, the same in every process.

    Example:
        >>> sample_rng(0, "robin", 1).random() == sample_rng(0, "robin", 1).random()
        True
    """
    return seeded_rng("crop", seed, key, variant)


@TRANSFORMS.register("dvae")
def dvae_transform(image: Image.Image, size: int, rng: random.Random) -> Tensor:
    """Preprocessing of stage 1, Listing 1: square crop anywhere, reduction, crop, random flip.

    The square of side ``s = min(h, w)`` is reduced to a random side between 9/8 and 12/8 of
    ``size``, or to ``s`` if that is smaller; 256 gives the paper's 288 and 384. A departure: the listing does not
    support ``s < size``; here, such a square is first enlarged to ``size``.

    Args:
        image: RGB image.
        size: Side of the result.
        rng: Source of randomness, see `sample_rng`.

    Returns:
        uint8 (3, size, size).

    Example:
        >>> image = Image.linear_gradient("L").convert("RGB")  # 256 x 256 pixels
        >>> first, again, other = (dvae_transform(image, 64, sample_rng(0, "robin", variant)) for variant in (1, 1, 2))
        >>> first.shape, torch.equal(first, again), torch.equal(first, other)
        (torch.Size([3, 64, 64]), True, False)
    """
    s = min(image.size)
    square = _square(image, rng.randint(0, image.width - s), rng.randint(0, image.height - s), size)
    s = len(square)
    t = rng.randint(min(s, round(size * 9 / 8)), min(s, round(size * 12 / 8)))
    pixels = _random_crop(area_resize(square, t), size, rng)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return _to_tensor(pixels)


@TRANSFORMS.register("prior")
def prior_transform(image: Image.Image, size: int, rng: random.Random) -> Tensor:
    """Preprocessing of stage 2, Listing 2: square crop near the center, reduction, crop, no flip.

    The offset of the square is in the central quarter of its range; the square is reduced to a random side from
    ``size`` to 9/8 of it. Images smaller than ``size`` are enlarged as in `dvae_transform`.

    Args:
        image: RGB image.
        size: Side of the result.
        rng: Source of randomness, see `sample_rng`.

    Returns:
        uint8 (3, size, size).

    Example:
        >>> image = Image.linear_gradient("L").convert("RGB")  # black at the top, white at the bottom
        >>> crop = prior_transform(image, 64, sample_rng(0, "robin", 1))
        >>> crop.shape, bool(crop[0, 0, 0] < crop[0, 63, 0])  # never mirrored
        (torch.Size([3, 64, 64]), True)
    """
    s = min(image.size)
    left, top = (_central_offset(slack, rng) for slack in (image.width - s, image.height - s))
    square = _square(image, left, top, size)
    t = rng.randint(size, min(len(square), round(size * 9 / 8)))
    return _to_tensor(_random_crop(area_resize(square, t), size, rng))


@TRANSFORMS.register("center")
def center_transform(image: Image.Image, size: int, rng: random.Random | None = None) -> Tensor:
    """Preprocessing of evaluation: Lanczos to a short side of ``size``, center crop.

    Args:
        image: RGB image.
        size: Side of the result.
        rng: Not used.

    Returns:
        uint8 (3, size, size).

    Example:
        >>> center_transform(Image.new("RGB", (300, 200), "white"), 64).shape
        torch.Size([3, 64, 64])
    """
    s = min(image.size)
    left, top = (image.width - s) / 2, (image.height - s) / 2
    box = (left, top, left + s, top + s)
    return _to_tensor(np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box=box)))


def area_resize(pixels: Pixels, t: int) -> Pixels:
    """Reduces a square by area averaging, like TensorFlow's AREA with aligned corners.

    Output pixel i is the mean of the input over ``[i r, (i + 1) r)``, ``r = (s - 1) / (t - 1)``,
    where the last pixel of the input is extended beyond the border. Pillow's box filter does not weight partial
    pixels, so it differs unless s / t is an integer.

    Args:
        pixels: uint8 (s, s, 3).
        t: New side, at most s.

    Returns:
        uint8 (t, t, 3).
    """
    s = len(pixels)
    if t > s:
        raise ValueError(f"t must be at most the side {s} (area averaging only reduces), got {t}")
    if t == s:
        return pixels
    ratio = (s - 1) / (t - 1) if t > 1 else float(s)
    starts = np.arange(t) * ratio
    first = np.floor(starts).astype(np.int64)
    reduced = pixels.astype(np.float32)
    for axis in (0, 1):
        rows = np.moveaxis(reduced, axis, 0)
        total = np.zeros((t, *rows.shape[1:]), np.float32)
        for offset in range(int(np.ceil(ratio)) + 1):
            low, high = first + offset, first + offset + 1
            overlap = np.minimum(high, starts + ratio) - np.maximum(low, starts)
            weight = (overlap.clip(0) / ratio).astype(np.float32)
            total += weight[:, None, None] * rows[low.clip(max=s - 1)]
        reduced = np.moveaxis(total, 0, axis)
    return reduced.round().clip(0, 255).astype(np.uint8)


def _central_offset(slack: int, rng: random.Random) -> int:
    low = 3 * slack // 8
    return rng.randrange(low, max(low + 1, 5 * slack // 8))


def _square(image: Image.Image, left: int, top: int, size: int) -> Pixels:
    """The largest square at an offset, (s, s, 3), enlarged to ``size`` if it is smaller."""
    s = min(image.size)
    square = image.crop((left, top, left + s, top + s))
    if s < size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square)


def _random_crop(pixels: Pixels, size: int, rng: random.Random) -> Pixels:
    slack = len(pixels) - size
    top, left = rng.randint(0, slack), rng.randint(0, slack)
    return pixels[top : top + size, left : left + size]


def _to_tensor(pixels: Pixels) -> Tensor:
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image must be RGB, got pixels of shape {pixels.shape}: see decode_image")
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).copy())
