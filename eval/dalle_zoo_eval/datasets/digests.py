"""Digests of files by their contents, which are not read again while a file stays as it is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dalle_zoo.files import read_json, sha256_file, write_json

MEMO = "digests.json"
"""Usual name of the file that remembers digests, in the folder of measured chunks."""
HASHERS = 4
"""Threads that read files; hashing leaves the interpreter."""
SETTLED = 2.0
"""Seconds after which a file's times tell whether it has changed since: file systems count in steps of up to two."""

Stamp = tuple[int, int, int]

_known: dict[str, tuple[Stamp, str]] = {}  # of this process: path to what it was when it was read, and its digest


def content_digests(paths: Sequence[Path], memo: Path | None = None) -> list[str]:
    """sha256 of the contents of files, in order.

    A file whose size and times (of its contents, and of its entry in the folder) are those of an earlier look keeps
    its digest. What was changed in the last two seconds is read again at every call.

    Args:
        paths: The files.
        memo: What `remember` wrote in another process; what cannot be read there is worked out again.
    """
    for name, entry in _remembered(memo).items():
        _known.setdefault(name, entry)
    names = [str(path.resolve()) for path in paths]
    with ThreadPoolExecutor(HASHERS) as threads:
        found = dict(zip(names, threads.map(_entry, names, paths), strict=True))
    now = time.time_ns()
    _known.update({name: entry for name, entry in found.items() if now - entry[0][1] > SETTLED * 1e9})
    return [found[name][1] for name in names]


def remember(paths: Sequence[Path], memo: Path) -> None:
    """Adds to a JSON file what this process knows of some files, for the next one."""
    before, names = _remembered(memo), [str(path.resolve()) for path in paths]
    after = before | {name: _known[name] for name in names if name in _known}
    if after != before:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, after)


def _entry(name: str, path: Path) -> tuple[Stamp, str]:
    status = path.stat()  # before the contents: a change while they are read makes the entry stale
    stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    known = _known.get(name)
    return known if known is not None and known[0] == stamp else (stamp, sha256_file(path))


def _remembered(memo: Path | None) -> dict[str, tuple[Stamp, str]]:
    if memo is None or not memo.is_file():
        return {}
    try:
        plain: Mapping[str, tuple[list[int], str]] = read_json(memo)
        return {str(name): ((stamp[0], stamp[1], stamp[2]), str(digest)) for name, (stamp, digest) in plain.items()}
    except (OSError, ValueError, TypeError, AttributeError, LookupError):
        return {}
