"""Paths as users type them."""

from __future__ import annotations

import os
from pathlib import Path

from dalle_zoo.values import check_type


def user_path(text: str | os.PathLike[str], name: str = "path") -> Path:
    """Returns a path with ``~`` replaced by the home folder. It is the ``type`` of all path options.

    Args:
        text: What was typed, or a path.
        name: What the path is, for errors. Defaults to "path".

    Raises:
        TypeError: The value is neither text nor a path.
        ValueError: The text is empty, which would name the working directory, or the home folder is not known.
    """
    check_type(name, text, (str, os.PathLike), "a path")
    if not str(text).strip():
        raise ValueError(f"{name} is empty, as an unset variable is: name a file or folder, or '.' for this folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} {str(text)!r}: this home folder is not known: give the complete path") from None
