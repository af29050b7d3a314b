"""Files written atomically: written beside their place, renamed once they have reached the disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath


def _usual_mode() -> int:
    mask = os.umask(0)  # which can only be read by setting it
    os.umask(mask)
    return 0o666 & ~mask


_MODE = _usual_mode()


def sync(path: Path) -> None:
    """Waits until the contents of a file have reached the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def publish(aside: Path, path: Path) -> None:
    """Gives a complete file its name, after its contents have reached the disk, and the permissions of a new file."""
    sync(aside)
    aside.chmod(_MODE)  # safetensors writes files that only their owner may read
    aside.replace(path)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields the name of a hidden file to write; it becomes ``path`` if the block ends without an error.

    Folders on the way to ``path`` are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may write into one folder, so the number of the process alone is not enough.
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield aside
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def stays_inside(name: str) -> bool:
    """Whether a relative path with forward slashes, as lists of files have it, leads to no place outside its folder.

    Example:
        >>> [stays_inside(name) for name in ("prior/config.json", "../config.json", "/etc/hostname")]
        [True, False, False]
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def check_ending(name: str, path: Path, endings: tuple[str, ...] = (".png",)) -> None:
    """Raises `ValueError` unless a path has the ending of a kind of file that can be written.

    Args:
        name: The argument, for the message ("path", "--out").
        path: What came.
        endings: The kinds; letter case does not matter.
    """
    if path.suffix.lower() not in endings:
        expected = ("one of " if len(endings) > 1 else "") + ", ".join(endings)
        raise ValueError(f"{name} must end in {expected}, got {str(path)!r}: choose another name")
