"""Digests of file contents, cached while files are unchanged."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dalle_zoo.files import read_json, sha256_file, write_json

MEMO = "digests.json"
"""Usual name of the file with cached digests, in the folder of features."""
HASHERS = 4
"""Number of threads that read files; hashing releases the GIL."""
SETTLED = 2.0
"""Age in seconds from which the times of a file reveal a change: file systems have a resolution of up to 2 s."""

Stamp = tuple[int, int, int]

_known: dict[str, tuple[Stamp, str]] = {}  # cache of this process: stamp and digest by path


def content_digests(paths: Sequence[Path], memo: Path | None = None) -> list[str]:
    """Returns the sha256 of the contents of files, in order.

    The digest of a file is reused if its size and times (modification and status change) are unchanged. Files changed
    in the last `SETTLED` seconds are read again at every call.

    Args:
        paths: The files.
        memo: File that `remember` wrote in another process; unreadable entries are computed again. Defaults to none.
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
    """Adds the known digests of files to a JSON file, for other processes."""
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
