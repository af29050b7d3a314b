"""Claims on work that any of several processes could do: one does it, the others pass by or wait.

A claim is a lock of the operating system on a file. The system takes it back when its owner ends, in whatever way, so
none outlives a kill or a lost machine, and none needs an age. The file names its owner for one purpose only: who waits
long says for whom, since an owner that hangs keeps its claim. Where a file system has no locks, all processes get all
claims: work may then be done twice, with one result.
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

PATIENCE = 60.0
"""Seconds after which one that waits says so."""


class Claims:
    """Claims of this process; those that are left are given back at the end of the ``with`` block."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def take(self, path: Path, *, wait: bool) -> bool:
        """Claims what a file stands for; the file is made.

        Args:
            path: The file.
            wait: Whether to wait until another owner gives it back, or ends.

        Returns:
            Whether it is ours now.
        """
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                if wait:
                    with _impatient(path):
                        fcntl.flock(file, fcntl.LOCK_EX)
                else:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError:
            pass  # a file system without locks
        except BaseException:  # interrupted while it waited
            os.close(file)
            raise
        self._files[path] = file
        with suppress(OSError):  # a full disk takes nothing from the lock
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        return True

    def release(self, path: Path) -> None:
        """Gives a claim back, when the work is done, and removes its file."""
        file = self._files.pop(path)
        with suppress(OSError):
            path.unlink()  # while it is ours; who waits for the old file finds the work done
        os.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for path in list(self._files):
            self.release(path)


@contextmanager
def _impatient(path: Path) -> Iterator[None]:
    """Tells in the log, after a while, whose claim the block waits for."""

    def tell() -> None:
        owner = path.read_text(errors="replace") if path.is_file() else ""
        log.warning(
            "waiting since %g s for %s, which works on %s: end it if it hangs, and its work is done here",
            PATIENCE, owner or "another process", path.with_suffix(""),
        )  # fmt: skip

    timer = threading.Timer(PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
