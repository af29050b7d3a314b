"""Checks of arguments that several modules share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names the settings that differ from those of unfinished work.

    Example:
        >>> changed_settings({"seed": 5, "size": 8}, {"seed": 6, "size": 8})
        'seed was 5 and is 6 now'
    """
    changed = [name for name, value in now.items() if before.get(name) != value]
    return "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r} now" for name in changed)
