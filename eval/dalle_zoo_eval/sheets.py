"""Sheets of images with captions below them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from dalle_zoo.fonts import font_for
from dalle_zoo.images import to_pil
from dalle_zoo.sheets import one_line, wrap_lines

# B tiles, M images per tile, H W pixels

_MARGIN, _GAP, _FONT, _LINE, _LINES = 10, 3, 11, 14, 3


def comparison_sheet(*image_sets: Tensor, captions: Sequence[str], columns: int = 6, scale: int = 2) -> Image.Image:
    """Arranges tiles of one or more images, each above its caption.

    Args:
        image_sets: M sets of pixels in [0, 1], (B, 3, H, W) each: tile i shows image i of each.
        captions: B captions; longer ones are cut to three lines that end in "…".
        columns: Tiles in a row.
        scale: Pixels of the sheet per pixel of an image, along a side.

    Returns:
        An RGB image on white.
    """
    sets = [to_pil(images) for images in image_sets]
    if not sets or {len(images) for images in sets} != {len(captions)} or not captions:
        counts = ", ".join(str(len(images)) for images in sets)
        raise ValueError(
            f"images must be one per caption in every set, got {counts or 'no set'} for {len(captions)} captions"
        )
    width, height = (scale * side for side in sets[0][0].size)
    tile_width = len(sets) * (width + _GAP) - _GAP + _MARGIN
    tile_height = height + _LINES * _LINE + _MARGIN
    columns = min(columns, len(captions))
    rows = -(-len(captions) // columns)
    size = (columns * tile_width + _MARGIN, rows * tile_height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, caption in enumerate(captions):
        left = _MARGIN + number % columns * tile_width
        top = _MARGIN + number // columns * tile_height
        for place, images in enumerate(sets):
            image = images[number].resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left + place * (width + _GAP), top))
        font, text = font_for(one_line(caption), _FONT)
        lines = wrap_lines(text, font, tile_width - _MARGIN, _LINES)
        draw.multiline_text((left, top + height + 2), "\n".join(lines), "black", font, spacing=2)
    return sheet
