"""Checks of arguments that several modules share."""

from __future__ import annotations

CAPTION_CHOICES = ("first", "random")


def check_positive(**values: int) -> None:
    """Raises `ValueError` naming the first argument that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_caption_choice(caption: str) -> None:
    """Raises `ValueError` unless the choice among several captions is a known one."""
    if caption not in CAPTION_CHOICES:
        raise ValueError(f"caption must be one of {', '.join(CAPTION_CHOICES)}, got {caption!r}")
