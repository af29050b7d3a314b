"""Gaussian blur of images, as figure 9 (a, b) of the paper needs it on real and generated ones alike.

The paper names radii of 0, 1, 2, 4 and 8 pixels and not the filter. This is Pillow's ``GaussianBlur`` at the image's
own resolution, the natural reading: the radius is the standard deviation, and the Gaussian is approached by three box
filters, the edge pixels being repeated. That the filter of the paper was this one is an assumption.
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
        radii: Standard deviations in pixels, at least 0; with 0 the images come back as they are.

    Returns:
        The images for every radius.
    """
    if any(radius < 0 for radius in radii):
        raise ValueError(f"a radius of blur must be at least 0 pixels, got {list(radii)}")
    for image in images:
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"images must be uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    if not any(radii):
        return {radius: list(images) for radius in radii}
    sharp = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
    # Pillow leaves the interpreter while it works, so that threads help.
    with ThreadPoolExecutor() as threads:
        return {r: list(threads.map(_blur, sharp, [r] * len(sharp))) if r else list(images) for r in radii}


def _blur(image: Image.Image, radius: int) -> Tensor:
    array = np.array(image.filter(ImageFilter.GaussianBlur(radius)))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
