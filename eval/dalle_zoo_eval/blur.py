"""Gaussian blur of real and generated images, as in figure 9 (a, b) of the paper.

The paper states radii of 0, 1, 2, 4 and 8 pixels, but not the filter. This module uses Pillow's ``GaussianBlur`` at
the resolution of the image: the radius is the standard deviation, three box filters approximate the Gaussian, and edge
pixels are repeated. We assume that the paper used this filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor


def gaussian_blur(images: Sequence[Tensor], radii: Sequence[int]) -> dict[int, list[Tensor]]:
    """Blurs decoded images with several radii.

    Args:
        images: uint8 (3, H, W) each.
        radii: Standard deviations in pixels, at least 0; 0 returns the images unchanged.

    Returns:
        Blurred images by radius.
    """
    if any(radius < 0 for radius in radii):
        raise ValueError(f"a radius of blur must be at least 0 pixels, got {list(radii)}")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"images must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    if not any(radii):
        return {radius: list(images) for radius in radii}
    sharp = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
    # Pillow releases the GIL, so threads help.
    with ThreadPoolExecutor() as threads:
        return {r: list(threads.map(_blur, sharp, [r] * len(sharp))) if r else list(images) for r in radii}


def _blur(image: Image.Image, radius: int) -> Tensor:
    array = np.array(image.filter(ImageFilter.GaussianBlur(radius)))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
