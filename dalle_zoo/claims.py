"""Claims on work that several processes could do: one process does it, the others wait, refuse or do other work.

A claim is a lock of the operating system (flock) on a file. The system releases it when its owner ends for whatever
reason, so no claim outlives a kill or a lost machine, and none needs an age. The file names its owner only for
messages: a process that waits long, or refuses to work, says which process has the claim. Threads of one process
exclude each other like processes do.

Where a file system has no locks, every process gets every claim: work may then be done twice, with the same result.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


log = logging.getLogger(__name__)

CLAIM = ".claim"
"""Name of the file whose claim is needed to write to a folder."""
PATIENCE = 60.0
"""Seconds after which a waiting process logs what it waits for."""


class ClaimedError(OSError):
    """Another process does the work at this moment. The message names it."""


class Claims:
    """Claims of this process. Those that remain are released at the end of the ``with`` block."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._locked: set[Path] = set()

    def take(self, path: Path, *, wait: bool) -> bool:
        """Claims the work that a file represents, and creates the file.

        Args:
            path: The file.
            wait: Whether to wait until another owner releases the claim, or ends.

        Returns:
            Whether this object has the claim now.
        """
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locked = _lock(file, path, wait=wait)
            except BlockingIOError:
                os.close(file)
                return False
            except BaseException:  # interrupted while it waited
                os.close(file)
                raise
            if not locked or _is_at(file, path):
                break
            os.close(file)  # its owner removed the file meanwhile: others would lock another one
        self._files[path] = file
        _DESCRIPTORS.add(file)
        if locked:
            self._locked.add(path)
        with suppress(OSError):  # a full disk does not weaken the lock
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        return True

    def hold(self, path: Path, work: object) -> None:
        """Claims without waiting.

        Args:
            path: The file.
            work: What is written, for the message.

        Raises:
            ClaimedError: Another process, or another thread, has the claim.
        """
        if not self.take(path, wait=False):
            raise ClaimedError(f"{_owner(path)} writes {work}: wait until it ends, or choose another destination")

    def excludes_others(self, path: Path) -> bool:
        """Returns whether no other process can have this claim; False if the file system has no locks."""
        return path in self._locked

    def release(self, path: Path) -> None:
        """Releases a claim, and removes its file."""
        file = self._files.pop(path)
        self._locked.discard(path)
        with suppress(OSError):
            path.unlink()  # while the lock is held; a process that waits for it notices, and creates another one
        _DESCRIPTORS.discard(file)
        os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in list(self._files):
            self.release(path)


_DESCRIPTORS: set[int] = set()
"""Open files of all claims of this process."""


def _close_in_child() -> None:
    # A forked worker shares the lock, which would otherwise survive its killed parent until the worker notices.
    for file in _DESCRIPTORS:
        os.close(file)
    _DESCRIPTORS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _lock(file: int, path: Path, *, wait: bool) -> bool:
    """Locks an open file; returns False where there are no locks, and raises `BlockingIOError` if another has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        with _impatient(path):
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    """Returns whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace") or "another process"
    return "another process"


@contextmanager
def _impatient(path: Path) -> Iterator[None]:
    """Logs, after a while, which process has the claim that the block waits for."""

    def report() -> None:
        log.warning(
            "waiting since %g s for %s, which has the claim %s: end it if it hangs, and its work is done here",
            PATIENCE, _owner(path), path,
        )  # fmt: skip

    timer = threading.Timer(PATIENCE, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
