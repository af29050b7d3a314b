"""Checks the places that a command writes to, before any work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dalle_zoo.claims import CLAIM
from dalle_zoo.cli.errors import UserError
from dalle_zoo.files import escape_surrogates

MOST_BYTES = 200
"""Longest name of a file or folder. File systems allow 255 bytes, and a temporary name adds a prefix and an ending."""
BLOCK = 4096
"""Size of the file that shows whether a folder can be written to, bytes."""


def check_file(option: str, path: Path, *, overwrite: bool = True) -> None:
    """Raises an error unless a file can be written.

    Args:
        option: Option that the path was passed as, for the message.
        path: The file.
        overwrite: Whether an existing file may be replaced. Defaults to True.

    Raises:
        FileExistsError: The file exists and must not be replaced.
        UserError: The path is a folder, its name is not UTF-8 or too long, or its folder cannot be written to.
    """
    _check_names(option, path)
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder: expected the name of a file")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: pass --overwrite to replace it, or choose another {option}")
    _check_writable(option, path, path.absolute().parent)


def check_folder(option: str, path: Path, *, overwrite: bool | None = True) -> None:
    """Raises an error unless a folder can be written.

    Args:
        option: Option that the path was passed as, for the message.
        path: The folder.
        overwrite: Whether it may contain files; None if it may not and the command has no ``--overwrite``. Defaults
            to True.

    Raises:
        FileExistsError: The folder contains files and must not.
        UserError: The path is a file, its name is not UTF-8 or too long, or it cannot be written to.
    """
    _check_names(option, path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file: expected a folder")
    if path.exists() and not overwrite and any(entry.name != CLAIM for entry in path.iterdir()):
        advice = "" if overwrite is None else "pass --overwrite, or "
        raise FileExistsError(f"{path} exists and is not empty: {advice}choose another {option}")
    _check_writable(option, path, path.absolute())


def _check_names(option: str, path: Path) -> None:
    for name in path.parts:
        if escape_surrogates(name) != name:  # records and PNG files state it as text
            raise UserError(f"{option} has a name that is not UTF-8 ({name!a}): choose another name")
        if len(os.fsencode(name)) > MOST_BYTES:
            raise UserError(
                f"{option} has a name of {len(os.fsencode(name))} bytes ({name[:20]}…): choose one of at most "
                f"{MOST_BYTES}"
            )


def _check_writable(option: str, path: Path, folder: Path) -> None:
    """Writes a temporary file to the folder, or to the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{option} {path} cannot be written: {folder} is a file")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(BLOCK))
    except OSError as error:
        raise UserError(
            f"{option} {path} cannot be written ({folder}: {error.strerror}): choose another place"
        ) from None
