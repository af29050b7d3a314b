"""Renders images of several captions in one image, with each caption above its images."""

from __future__ import annotations

import bisect
from typing import Any

from PIL import Image
from torch import Tensor

from dalle_zoo.fonts import font_for
from dalle_zoo.images import make_grid

# B images, H W pixels

LINE = 18
"""Height of a line of a caption, pixels."""
MOST_LINES = 3
"""Lines of a caption; the rest is truncated."""
_SIZE, _MARGIN = 13, 4


def caption_sheet(images: Tensor, captions: list[str], columns: int, scale: int = 2, across: int = 1) -> Image.Image:
    """Renders the images of several captions in one image, with each caption above its images.

    Args:
        images: Pixels in [0, 1], (B, 3, H, W), grouped by caption, with the same number of images per caption.
        captions: Captions, in the order of the images. They wrap at the width of their images, and are truncated to
            three lines.
        columns: Maximum number of images per row.
        scale: Factor by which images are enlarged, in both directions. Defaults to 2.
        across: Captions next to each other. Defaults to 1.
    """
    each = len(images) // len(captions)
    blocks = [
        _block(make_grid(images[index * each : (index + 1) * each], min(columns, each)), caption, scale)
        for index, caption in enumerate(captions)
    ]
    lines = [blocks[first : first + across] for first in range(0, len(blocks), across)]
    heights, width = [max(block.height for block in line) for line in lines], max(b.width for b in blocks)
    sheet = Image.new("RGB", (width * max(map(len, lines)), sum(heights)), "white")
    bottom = 0
    for line, height in zip(lines, heights, strict=True):
        bottom += height
        for number, block in enumerate(line):
            sheet.paste(block, (number * width, bottom - block.height))
    return sheet


def _block(grid: Tensor, caption: str, scale: int) -> Image.Image:
    """Returns an enlarged grid, uint8 (3, H, W), below its caption."""
    from PIL import ImageDraw

    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    font, text = font_for(one_line(caption), _SIZE)
    lines = wrap_lines(text, font, image.width - 2 * _MARGIN, MOST_LINES)
    block = Image.new("RGB", (image.width, image.height + LINE * len(lines)), "white")
    block.paste(image, (0, LINE * len(lines)))
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, 2 + LINE * number), line, fill="black", font=font)
    return block


def one_line(text: str) -> str:
    r"""Returns a text that can be rendered in one line: line breaks become spaces, unprintable characters "?".

    Example:
        >>> one_line("a red\napple \ud800")
        'a red apple ?'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def wrap_lines(text: str, font: Any, width: float, most: int) -> list[str]:
    """Breaks a text into lines, between words where a word is not longer than a line.

    Args:
        text: Any text.
        font: A font of Pillow, which measures the text.
        width: Largest width of a line, pixels.
        most: Largest number of lines, at least 1; the last one then ends in "…".

    Returns:
        At least one line, which is empty if the text is.
    """
    lines: list[str] = []
    rest = one_line(text)
    while len(lines) < most - 1 and (length := _fitting(rest, font, width)) < len(rest):
        space = rest.rfind(" ", 0, length + 1)
        end = space if space > 0 else max(length, 1)
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return [*lines, fit_line(rest, font, width)]


def fit_line(text: str, font: Any, width: float) -> str:
    """Returns a text in one line, truncated to a width and then ending in "…".

    Args:
        text: Any text.
        font: A font of Pillow, which measures the text.
        width: Largest width, pixels.
    """
    line = one_line(text)
    if _fitting(line, font, width) == len(line):
        return line
    length = _fitting(line, font, width, end="…")
    return line[:length] + "…" if length > 0 else ""


def _fitting(line: str, font: Any, width: float, end: str = "") -> int:
    """Returns how many leading letters of a line fit a width with an ending; -1 if not even the ending fits."""
    # No letter that is seen is narrower than a pixel: the rest of a long text is never measured.
    some = line[: max(int(width), 0) + 1]
    fits = range(len(some) + 1)
    return bisect.bisect_right(fits, width, key=lambda count: font.getlength(some[:count] + end)) - 1
