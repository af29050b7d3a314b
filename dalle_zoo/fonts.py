"""Chooses a font that has the letters of a caption, whatever its script."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def font_for(text: str, size: int) -> tuple[Any, str]:
    r"""Returns a font of Pillow, and the text with every letter that the font lacks as its code point.

    Pillow's own font has Latin letters. If a text has others, the installed fonts are searched for the one that lacks
    the fewest, and a warning names the letters that it lacks.

    Args:
        text: Any text.
        size: Height of a line, pixels.

    Example:
        >>> font_for("a cat \U0010fffd", 13)[1]
        'a cat [U+10FFFD]'
    """
    from PIL import ImageFont  # its fonts take time to load, and not every caller needs them

    needed = {letter for letter in text if not letter.isspace()}
    font = ImageFont.load_default(size)
    lacking = _without_glyph(font, needed)
    for path in _installed() if lacking else ():
        lacks = {letter for letter in needed if ord(letter) not in _letters(path)}
        if len(lacks) < len(lacking):
            try:
                font, lacking = ImageFont.truetype(path, size), lacks
            except OSError:  # bitmaps of another size
                continue
            if not lacking:
                break
    if lacking:
        log.warning("no installed font has %s: install one, such as Noto Sans", ", ".join(sorted(map(_code, lacking))))
    return font, "".join(f"[{_code(letter)}]" if letter in lacking else letter for letter in text)


def _code(letter: str) -> str:
    return f"U+{ord(letter):04X}"


def _without_glyph(font: Any, letters: set[str]) -> set[str]:
    """Returns the letters that a font renders like a missing glyph."""

    def rendered(letter: str) -> tuple[Any, bytes]:
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    absent = rendered("\uffff")
    return {letter for letter in letters if rendered(letter) == absent}


def _installed() -> Iterator[str]:
    """Paths of fonts: matplotlib's own, which has most alphabets, then those of the system."""
    import matplotlib as mpl
    from matplotlib import font_manager

    yield str(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    yield from sorted(font_manager.findSystemFonts())


@cache
def _letters(path: str) -> frozenset[int]:
    """Code points that a font has; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        return frozenset()
