"""Files behind URLs (``https://``, ``s3://``, ``gs://``, ``hf://``), read in blocks through fsspec.

A request that fails is repeated, and only the block that it asked for is read again.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, TypeVar, cast

log = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK = 2**23
"""Bytes of a request. Smaller blocks read less when only headers are needed, larger ones need fewer requests."""
DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each repetition of a request that failed."""
_TEMPORARY = (408, 425, 429)
"""Statuses of HTTP below 500 after which a request is worth repeating."""


@dataclass(frozen=True)
class RemoteStatus:
    """What identifies the contents of a remote file."""

    st_size: int
    """Size in bytes, named as in the standard library."""
    tag: str = ""
    """What the server says to tell contents apart, such as HTTP's ETag."""


@dataclass(frozen=True)
class RemotePath:
    """The URL of a file or folder, with those methods of `pathlib.Path` that the readers of shards use."""

    url: str

    def __str__(self) -> str:
        return self.url.partition("?")[0]  # the rest may be a signature

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return PurePosixPath(str(self)).name

    @property
    def parent(self) -> RemotePath:
        """The folder."""
        return RemotePath(str(self).rpartition("/")[0])

    def stat(self) -> RemoteStatus:
        """Asks for size and tag; raises `OSError` if the file does not exist or cannot be reached."""
        info = _repeated(self, lambda system, path: system.info(path))
        if info.get("size") is None:
            raise OSError(f"{self}: the server does not state the size: download the file")
        tags = (info.get(name) for name in ("ETag", "etag", "LastModified", "mtime", "mtimeMs"))
        return RemoteStatus(int(info["size"]), str(next(filter(None, tags), "")))

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Opens the file for reading."""
        return cast(IO[bytes], io.BufferedReader(_RemoteFile(self), buffer_size=1 << 16))

    def glob(self) -> list[RemotePath]:
        """Finds the files whose URL matches this one, in which ``*`` is any text."""
        found = _repeated(self, lambda system, path: [system.unstrip_protocol(name) for name in system.glob(path)])
        return sorted((RemotePath(url) for url in found), key=str)


class _RemoteFile(io.RawIOBase):
    """A remote file, of which one block at a time is in memory."""

    def __init__(self, path: RemotePath) -> None:
        self._path, self._status = path, path.stat()
        self._position, self._first, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._status.st_size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        if not self._first <= self._position < self._first + len(self._block):
            self._first = self._position
            self._block = self._fetch(self._position, min(self._position + BLOCK, self._status.st_size))
        start = self._position - self._first
        part = self._block[start : start + len(target)]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _fetch(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""

        def read(system: Any, path: str) -> bytes:
            data = bytes(system.cat_file(path, start=start, end=stop))
            if len(data) != stop - start:
                if self._path.stat() != self._status:
                    raise _PermanentError(f"{self._path} has changed while it was read")
                raise OSError(f"got {len(data)} bytes instead of {stop - start}: a broken connection, or no ranges")
            return data

        return _repeated(self._path, read)


class _PermanentError(OSError):
    """An error that a repetition does not help."""


def _repeated(path: RemotePath, action: Callable[[Any, str], T]) -> T:
    """Calls a function of a file system and a path in it, again after errors that may be temporary.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be reached; the message names it.
        ValueError: There is no such kind of URL.
        ImportError: The package for this kind of URL is not installed.
    """
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(path.url)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: expected https://, s3://, gs://, hf:// or another of fsspec") from None
    except ImportError as error:
        raise ImportError(f"{path} needs another package ({error}): `pip install 'dalle-zoo[remote]'`") from None
    for delay in (*DELAYS, None):
        try:
            return action(system, inner)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist ({error})") from None
        except _PermanentError:
            raise
        except Exception as error:  # each file system raises those of its own library
            status = getattr(error, "status", None)
            permanent = isinstance(status, int) and 400 <= status < 500 and status not in _TEMPORARY
            if permanent or isinstance(error, PermissionError) or delay is None:
                reason = f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
                raise OSError(f"{path} cannot be read ({reason})") from None
            log.warning("%s: %s; trying again in %g s", path, error or type(error).__name__, delay)
            time.sleep(delay)
    raise AssertionError("the last attempt returns or raises")
