"""Claims on work that any of several processes could do: one does it, the others pass by or wait.

A claim is a lock of the operating system on an empty file. The system takes it back when its owner ends, in whatever
way, so none outlives a kill or a lost machine, and none needs an age or a name. Where a file system has no locks, all
processes get all claims: work may then be done twice, with one result.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        except OSError:
            pass  # a file system without locks
        except BaseException:  # interrupted while it waited
            os.close(file)
            raise
        self._files[path] = file
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
