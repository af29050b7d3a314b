"""Paths as users type them."""

from __future__ import annotations

from pathlib import Path


def user_path(text: str | Path, name: str = "path") -> Path:
    """Returns a path with ``~`` replaced by the home folder. It is the ``type`` of all path options.

    Args:
        text: What was typed, or a path.
        name: What the path is, for errors. Defaults to "path".

    Raises:
        ValueError: The text is empty, which would name the working directory, or the home folder is not known.
    """
    if not str(text).strip():
        raise ValueError(f"{name} is empty, as an unset variable is: name a file or folder, or '.' for this folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{name} {str(text)!r}: this home folder is not known: give the complete path") from None
