"""Reads the members of tar archives that may be damaged or hostile, in one pass and in bounded time and memory.

`tarfile` parses single headers here, but does not follow them: it processes extended headers recursively, and older
versions of Python loop forever on negative sizes (CVE-2025-8194) and search extended headers in quadratic time
(CVE-2024-6232).
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from dalle_zoo.data.remote import RemotePath

MAX_EXTENSION = 2**20
"""Largest long name or extended header, in bytes."""
MAX_PADDING = 2**24
"""Bytes after the end of an archive that are searched for hidden members; the largest padding of GNU tar is 1 MiB."""

_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 512
_PIECE = 2**20
_MAX_DIGITS = 20  # more than any file has bytes
_MORE_IN_HEADER, _MORE_IN_BLOCK = 482, 504  # bytes that say whether another block describes a sparse file of GNU tar
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class DamagedArchiveError(ValueError):
    """An archive, or the rest of it, cannot be read."""


@dataclass(frozen=True)
class Member:
    """One wanted member."""

    name: str
    """Path in the archive, in which bytes that are not UTF-8 are lone surrogates."""
    data: bytes | None
    """Contents; None if there is a problem or the contents were not requested."""
    problem: str = ""
    """Why the contents cannot be used."""


@dataclass(frozen=True)
class Place:
    """Where the contents of a member are stored in an uncompressed archive."""

    name: str
    offset: int
    size: int


def read_members(
    path: Path | RemotePath, limit: Callable[[str], int | None], *, contents: Callable[[str], bool] = lambda name: True
) -> Iterator[Member]:
    """Reads files from an archive in stored order.

    Args:
        path: A tar file, local or remote, which may be compressed by gzip.
        limit: Function of a member's name that returns its largest accepted size in bytes, or None to ignore it.
        contents: Function of a member's name that returns whether to read its contents. Without them, the same
            members are found. Defaults to reading all.

    Yields:
        Members that are wanted. Links and members above their limit have a problem instead of contents.

    Raises:
        DamagedArchiveError: After the members before the damage.
    """
    with _damage(), _open(path) as stream:
        reader = _Reader(stream)
        for header in _headers(reader):
            largest = limit(header.name)
            if largest is not None and header.info.type != tarfile.DIRTYPE:
                problem = header.problem(largest)
                data = None
                if not problem and contents(header.name):
                    data = reader.read(header.size)
                else:
                    reader.skip(header.size)  # before the member is yielded, since its contents may be truncated
                yield Member(header.name, data, problem)


def find_members(stream: IO[bytes]) -> Iterator[Place]:
    """Finds the regular files in an uncompressed archive.

    Raises:
        DamagedArchiveError: After the members before the damage.
    """
    with _damage():
        reader = _Reader(stream)
        for header in _headers(reader):
            if header.info.isreg():
                yield Place(header.name, reader.position, header.size)


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file to an archive. Its owner and time are 0, so that equal data give equal bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DamagedArchiveError(f"{type(error).__name__}: {error.args[0] if error.args else 'damaged'}") from None


@contextmanager
def _open(path: Path | RemotePath) -> Iterator[IO[bytes]]:
    with path.open("rb") as file:
        zipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        # gzip checks sizes and checksums; tarfile's own decompression of streams lets damage pass unseen.
        with cast(IO[bytes], gzip.open(file, "rb")) if zipped else nullcontext(file) as stream:
            yield stream


class _Reader:
    """Reads and skips forward only, so that no archive is decompressed twice, and detects truncation."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._size: int | None = None
        if not isinstance(stream, gzip.GzipFile):
            self._size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
        self.position = 0

    def read(self, size: int) -> bytes:
        self._check(size)
        data = self._stream.read(size)
        if len(data) < size:
            raise DamagedArchiveError("truncated")
        self.position += size
        return data

    def skip(self, size: int) -> None:
        self._check(size)
        if self._size is not None:
            self.position = self._stream.seek(size, os.SEEK_CUR)
            return
        while size > 0:
            size -= len(self.read(min(size, _PIECE)))

    def _check(self, size: int) -> None:
        if self._size is not None and self.position + size > self._size:
            raise DamagedArchiveError("truncated")

    def check_end(self) -> None:
        """Raises an error if anything but zeros follows the end-of-archive marker."""
        for _ in range(MAX_PADDING // _PIECE):
            piece = self._stream.read(_PIECE)
            if any(piece):
                raise DamagedArchiveError("more members follow the end-of-archive marker")
            if not piece:
                return


@dataclass(frozen=True)
class _Header:
    name: str
    size: int
    """Bytes of contents that follow."""
    info: tarfile.TarInfo
    extended: dict[str, str]
    """Fields of extended headers."""

    def problem(self, limit: int) -> str:
        """Returns the reason why the contents cannot be used; empty if they can."""
        if self.info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            target = self.extended.get("linkpath", self.info.linkname)
            return (
                f"a link to {target!r}, and links in archives are not followed: pack the files again with "
                "`tar --dereference --hard-dereference`"
            )
        if self.info.type == tarfile.GNUTYPE_SPARSE or any(name.startswith("GNU.sparse") for name in self.extended):
            return "a sparse file: pack it again without `tar --sparse`"
        if not self.info.isreg():
            return "not a regular file"
        return f"{self.size} bytes long, more than {limit}" if self.size > limit else ""


def _headers(reader: _Reader) -> Iterator[_Header]:
    """Yields the headers of members, and skips what was not read of their contents."""
    defaults: dict[str, str] = {}  # of global extended headers
    extended: dict[str, str] = {}
    while any(block := reader.read(_BLOCK)):
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if info.type in _EXTENSIONS:
            fields = _extension(info, reader)
            (defaults if info.type == tarfile.XGLTYPE else extended).update(fields)
            continue
        fields, extended = defaults | extended, {}
        name = fields.get("path", info.name)
        size = 0 if info.type in _WITHOUT_DATA else _size(fields.get("size"), info.size, name)
        more = info.type == tarfile.GNUTYPE_SPARSE and block[_MORE_IN_HEADER]
        while more:
            more = reader.read(_BLOCK)[_MORE_IN_BLOCK]
        end = reader.position + size + -size % _BLOCK
        yield _Header(name, size, info, fields)
        reader.skip(end - reader.position)
    reader.check_end()


def _size(extended: str | None, plain: int, name: str) -> int:
    if extended is not None and not (extended.isdecimal() and len(extended) <= _MAX_DIGITS):
        raise DamagedArchiveError(f"member {name!r} has the size {extended[:_MAX_DIGITS]!r}")
    size = plain if extended is None else int(extended)
    if size < 0:
        raise DamagedArchiveError(f"member {name!r} has the size {size}")
    return size


def _extension(info: tarfile.TarInfo, reader: _Reader) -> dict[str, str]:
    """Reads a long name or an extended header, as fields of a pax header."""
    if not 0 <= info.size <= MAX_EXTENSION:
        raise DamagedArchiveError(f"an extended header has {info.size} bytes, more than {MAX_EXTENSION}")
    data = reader.read(info.size)
    reader.skip(-info.size % _BLOCK)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(data.partition(b"\0")[0])}
    if info.type == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": _text(data.partition(b"\0")[0])}
    fields, rest = {}, memoryview(data)
    while rest:  # records "LENGTH NAME=VALUE\n", where LENGTH counts the complete record
        digits = bytes(rest[:8]).partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = bytes(rest[len(digits) + 1 : length])
        name, sign, value = record.partition(b"=")
        if not (sign and value.endswith(b"\n")):
            raise DamagedArchiveError("an extended header is damaged")
        fields[_text(name)] = _text(value[:-1])
        rest = rest[length:]
    return fields


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
