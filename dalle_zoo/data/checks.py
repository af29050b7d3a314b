"""Checks of arguments that several modules share."""

from __future__ import annotations

from dalle_zoo.values import as_integer

CAPTION_CHOICES = ("first", "random")


def check_positive(**values: int) -> None:
    """Raises an error that names the first argument that is not an integer of at least 1."""
    for name, value in values.items():
        as_integer(name, value, least=1)


def check_caption_choice(caption: str) -> None:
    """Raises `ValueError` unless the choice among several captions is a known one."""
    if caption not in CAPTION_CHOICES:
        raise ValueError(f"caption must be one of {', '.join(CAPTION_CHOICES)}, got {caption!r}")
