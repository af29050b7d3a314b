"""Sheets of images with captions below them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from dalle_zoo.fonts import font_for
from dalle_zoo.images import to_pil
from dalle_zoo.sheets import fit_line, one_line, wrap_lines

# B tiles, M images per tile, H W pixels

_MARGIN, _GAP, _FONT, _LINE = 10, 3, 11, 14
_LINES = 6
"""Lines of a caption at most."""
_NARROWEST = 110
"""Width of a tile at least, pixels, so that captions of small images can be read."""


def comparison_sheet(
    *image_sets: Tensor, captions: Sequence[str], columns: int = 6, scale: int = 2, title: str = ""
) -> Image.Image:
    """Arranges tiles of one or more images, each above its caption.

    Args:
        image_sets: M sets of pixels in [0, 1], (B, 3, H, W) each: tile i shows image i of each.
        captions: B captions. They wrap at the width of their tile; beyond six lines they are cut and end in "…".
        columns: Tiles in a row.
        scale: Pixels of the sheet per pixel of an image, along a side.
        title: Line above all tiles. Defaults to none.

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
    tile_width = max(len(sets) * (width + _GAP) - _GAP, _NARROWEST) + _MARGIN
    fonts = [font_for(one_line(caption), _FONT) for caption in captions]
    texts = [wrap_lines(text, font, tile_width - _MARGIN, _LINES) for font, text in fonts]
    tile_height = height + max(map(len, texts)) * _LINE + _MARGIN
    columns = min(columns, len(captions))
    rows = -(-len(captions) // columns)
    above = _LINE + _MARGIN if title else 0
    size = (columns * tile_width + _MARGIN, above + rows * tile_height + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        font, text = font_for(one_line(title), _FONT)
        draw.text((_MARGIN, _MARGIN), fit_line(text, font, size[0] - 2 * _MARGIN), "black", font)
    for number, lines in enumerate(texts):
        left = _MARGIN + number % columns * tile_width
        top = above + _MARGIN + number // columns * tile_height
        for place, images in enumerate(sets):
            image = images[number].resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (left + place * (width + _GAP), top))
        draw.multiline_text((left, top + height + 2), "\n".join(lines), "black", fonts[number][0], spacing=2)
    return sheet
