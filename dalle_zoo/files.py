"""Reads JSON files with errors that name the file, and writes files and folders atomically.

A file or folder is written in a workspace next to its destination (`dalle_zoo.workspaces`), synced to disk, and then
renamed. Readers see the old contents or the new ones, never a part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol

from dalle_zoo.plain_data import MAX_BYTES, PlainDataError, json_value
from dalle_zoo.workspaces import new_path, place_folder, workspace


class Readable(Protocol):
    """A file to read: a `Path`, or another object with the same method."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Opens the file."""


class FileError(ValueError):
    """A file is missing or damaged, or its contents are not the expected ones. The message names the file."""


# ---------------------------------------------------------------- reading


def read_json(path: Readable, expected: str = "a JSON file") -> dict[str, Any]:
    """Reads a file that contains one JSON object.

    Args:
        path: The file.
        expected: What the file should be, for the error when it is missing.

    Raises:
        FileError: The file is missing or cannot be read, or `parse_json` refuses its contents.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # which `parse_json` refuses
    except FileNotFoundError:
        raise FileError(f"{path} is missing: expected {expected}") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    return parse_json(data, path)


def parse_json(data: bytes, source: Readable | str) -> dict[str, Any]:
    """Parses one JSON object.

    Args:
        data: UTF-8 text.
        source: The file that it came from, for errors.

    Raises:
        FileError: The data is not valid JSON or not an object, or exceeds the limits of `dalle_zoo.plain_data`.
    """
    try:
        value = json_value(data)
    except PlainDataError as error:
        raise FileError(f"{source} {error}") from None
    if not isinstance(value, dict):
        raise FileError(f"{source} must contain a JSON object, got {type(value).__name__}")
    return value


def try_read_json(path: Readable) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if `read_json` raises `FileError`."""
    try:
        return read_json(path)
    except FileError:
        return None


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 digest of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- paths


LONGEST_NAME, LONGEST_PATH = 255, 1024
"""Bytes of the longest file name that common file systems hold, and of the longest relative path that is accepted."""


def stays_inside(name: str) -> bool:
    """Returns whether a relative path, with forward slashes, stays inside the folder that it is relative to.

    A path that no file can have, since it is too long or contains NUL, does not.

    Example:
        >>> [stays_inside(name) for name in ("prior/config.json", "../config.json", "/etc/hostname")]
        [True, False, False]
    """
    path = PurePosixPath(name)
    sizes = [len(part.encode(errors="surrogatepass")) for part in path.parts]
    possible = max(sizes, default=0) <= LONGEST_NAME and sum(sizes) <= LONGEST_PATH and "\0" not in name
    return possible and bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def check_ending(name: str, path: Path, endings: tuple[str, ...] = (".png",)) -> None:
    """Raises `ValueError` unless a path ends in one of the supported file extensions.

    Args:
        name: The argument that the path was passed as, for the message ("path", "--out").
        path: The path.
        endings: Supported extensions. The comparison ignores case.
    """
    if path.suffix.lower() not in endings:
        expected = ("one of " if len(endings) > 1 else "") + ", ".join(endings)
        raise ValueError(f"{name} must end in {expected}, got {str(path)!r}: choose another name")


# ---------------------------------------------------------------- writing


def json_text(value: Any) -> str:
    """Returns a value in the JSON form that `write_json` writes: indented by two spaces, not restricted to ASCII.

    Lone surrogates, as in the names of files that are not UTF-8, are escaped, since UTF-8 has no form for them.

    Raises:
        ValueError: A number is not finite, which JSON cannot express.
    """
    return escape_surrogates(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def escape_surrogates(text: str) -> str:
    r"""Replaces lone surrogates, which UTF-8 cannot express, by their escapes.

    Example:
        >>> escape_surrogates("caf\udce9.png")
        'caf\\udce9.png'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to ``path`` if the block ends without an error.

    Missing parent folders of ``path`` are created. Of several processes, each waits until the one before has ended.

    Raises:
        OSError: The disk is full; the error names ``path``, also if a library reported it without a name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with workspace(path) as folder:
        temporary = new_path(folder)
        try:
            yield temporary
            sync(temporary)
            temporary.chmod(_DEFAULT_MODE)  # safetensors creates files that only their owner may read
            temporary.replace(path)
        except Exception as error:
            # PyTorch's writer does not state why it failed.
            silent = "inline_container" in str(error) and shutil.disk_usage(folder).free < LEAST_FREE
            if not silent and not is_disk_full(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        finally:
            temporary.unlink(missing_ok=True)


LEAST_FREE = 1 << 16
"""Free bytes of a disk below which a failure to write is taken for a lack of space."""


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an exception reports a full disk. Libraries in Rust give the number in their message only."""
    return getattr(error, "errno", None) == errno.ENOSPC or "(os error 28)" in str(error)


def sync(path: Path) -> None:
    """Waits until the contents of a file are on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _default_mode() -> int:
    mask = os.umask(0)  # the mask can only be read by setting it
    os.umask(mask)
    return 0o666 & ~mask


_DEFAULT_MODE = _default_mode()


@contextmanager
def new_folder(
    folder: Path, *, overwrite: bool = False, marker: str = "config.json", contents: Sequence[str] = ("*",)
) -> Iterator[Path]:
    """Yields a temporary folder to fill, and gives it the name ``folder`` if the block ends without an error.

    While another process writes the same folder, this one waits.

    Args:
        folder: The destination. It must not exist or must be empty, unless ``overwrite`` is set.
        overwrite: Whether to replace an existing folder of the same kind; old and new folder exchange their names in
            one step, see `dalle_zoo.workspaces.place_folder`. Defaults to False.
        marker: File that identifies a folder of this kind. A folder without it is never replaced. Defaults to
            ``config.json``.
        contents: Patterns of all files that folders of this kind contain. A folder with other files is never
            replaced. Defaults to any file.

    Raises:
        FileExistsError: The destination is not empty and must not be replaced, or another process created it in the
            meantime.
        NotADirectoryError: The destination is a file.
    """
    folder = Path(folder).resolve()  # two names of one folder are one destination
    _check_replaceable(folder, overwrite, marker, contents)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with workspace(folder) as aside:
        _check_replaceable(folder, overwrite, marker, contents)  # again, if another process wrote it meanwhile
        temporary = new_path(aside)
        temporary.mkdir()
        try:
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    sync(path)
            if overwrite:
                _check_replaceable(folder, overwrite, marker, contents)  # and what came while this one worked
            place_folder(temporary, folder, replace=overwrite)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool, marker: str, contents: Sequence[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty: choose another folder or pass --overwrite")
    if not (folder / marker).is_file():
        raise FileExistsError(
            f"{folder} contains other files and is not replaced (it has no {marker}): choose another folder"
        )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and not any(fnmatchcase(name, pattern) for pattern in contents):
            raise FileExistsError(
                f"{folder} contains {name}, which would be deleted: move it, or choose another folder"
            )
