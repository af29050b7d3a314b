"""The sheet of a group: its first generated images, next to real ones where there are any to compare with."""

from __future__ import annotations

import torch
from PIL import Image
from torch.nn import functional as F

from dalle_zoo_eval.datasets import load_image
from dalle_zoo_eval.groups import Group
from dalle_zoo_eval.protocol import Protocol
from dalle_zoo_eval.sheets import comparison_sheet

SHEET = 24
"""Samples on a sheet."""


def sample_sheet(group: Group, protocol: Protocol, *, right: str | None = None) -> Image.Image:
    """Returns the first generated images; where a model generated them, next to the real image of the same caption.

    Args:
        group: The images.
        protocol: How real images are cropped and scaled.
        right: Name of the other side of a comparison, whose images are shown in their order. Defaults to none.
    """
    found, image, items = group.generated, protocol.image, group.prompts.samples
    indices = range(min(SHEET, len(found.keys)))
    by_key = {item.key: item for item in group.prompts.dataset.items}
    paired = group.prompts.captions is not None and all(by_key[found.keys[i]].image is not None for i in indices)
    sets = [group.stores["generated"].images(indices)] if group.generates or not paired else []
    size = image.size or (sets[0][0].shape[-1] if sets else None)
    title = "generated images" if sets else "real images"
    if right is not None:
        indices = range(min(len(indices), len(items)))
        sets = [sets[0][: len(indices)], [load_image(items[i], image.crop, size) for i in indices]]
        title = f"left {found.record['name']}, right {right}, not paired"
    elif paired:
        title = "left generated, right real" if sets else title
        sets.append([load_image(by_key[found.keys[i]], image.crop, size) for i in indices])
    size = size or sets[0][0].shape[-1]
    names = found.texts if found.texts is not None else found.keys
    stacked = [torch.stack([_resized(image, size) for image in images]) for images in sets]
    return comparison_sheet(*stacked, captions=names[: len(indices)], scale=2 if size < 128 else 1, title=title)


def _resized(image: torch.Tensor, side: int) -> torch.Tensor:
    pixels = image[None].float() / 255
    if image.shape[1:] != (side, side):
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).clamp(0, 1)
    return pixels[0]
