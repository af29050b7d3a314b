"""Hidden folders in which files and folders are written before they appear at their names.

```
codes              the destination, a file or a folder
.codes.writing/    its workspace, only while something is written
    .claim         lock of the process that writes
    3f0c…          what is being written, under a random name
    unfinished     work that a later call continues (`RESUMABLE`)
    replaced       the earlier folder, while it is replaced on a file system that cannot exchange two folders
```

Only the owner of the claim writes, and it first removes what killed processes left. Where a file system has no locks,
random names still separate two processes that write at once; then nothing of others is removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dalle_zoo.claims import CLAIM, Claims

SUFFIX = ".writing"
RESUMABLE = "unfinished"
"""Entry of a workspace that is not removed when its process ends."""
_REPLACED = "replaced"

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h> and <linux/fs.h>
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def workspace(path: Path, *, wait: bool = True) -> Iterator[Path]:
    """Claims a destination, and yields a hidden folder next to it.

    A replacement that was killed half way is undone first, and what killed processes left is removed.

    Args:
        path: The destination, which may be missing. Its parent folder must exist.
        wait: Whether to wait while another process writes there. Defaults to True.

    Raises:
        ClaimedError: Another process writes there, and ``wait`` is False.
    """
    folder = _workspace_of(path)
    claim = folder / CLAIM
    with Claims() as claims:
        _claim(claims, claim, path, wait=wait)
        try:
            _restore(path)
            if claims.excludes_others(claim):
                _clear(folder)
            yield folder
        finally:
            _restore(path)
            claims.release(claim)
            with suppress(OSError):  # it is not empty if a process waits, or if work can be resumed
                folder.rmdir()


@contextmanager
def claimed_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Claims a folder that is filled under its name, file by file; it is created, and removed if it stays empty.

    What killed processes left of single files is removed first.

    Args:
        folder: The folder.
        wait: Whether to wait while another process has the claim. Defaults to False.

    Raises:
        ClaimedError: Another process writes there, and ``wait`` is False.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with Claims() as claims:
        _claim(claims, folder / CLAIM, folder, wait=wait)
        remove_abandoned(folder)
        try:
            yield
        finally:
            claims.release(folder / CLAIM)
            with suppress(OSError):  # not empty
                folder.rmdir()


def new_path(folder: Path) -> Path:
    """Returns a path in a workspace that nothing else uses."""
    return folder / secrets.token_hex(8)


def place_folder(new: Path, folder: Path, *, replace: bool) -> None:
    """Moves a complete folder to its name. A folder with that name is replaced, and removed.

    Old and new folder are exchanged in one step where the system can do so (Linux, on most local file systems).
    Elsewhere the old folder is renamed first; the next writer, or `recover`, undoes this if the process is killed
    before the new one has its name.

    Args:
        new: A folder in the workspace of the destination.
        folder: The destination.
        replace: Whether to replace a folder that is not empty.

    Raises:
        FileExistsError: The destination is not empty, and ``replace`` is False.
    """
    if not replace or not folder.exists():
        try:
            new.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            raise FileExistsError(f"another process created {folder} in the meantime; it was not replaced") from None
        return
    if not _exchange(new, folder):
        replaced = new.with_name(_REPLACED)
        folder.rename(replaced)
        new.rename(folder)
        new = replaced
    shutil.rmtree(new, ignore_errors=True)


def recover(path: Path) -> None:
    """Undoes a replacement that was killed half way, for readers that do not find a folder; else does nothing."""
    if path.exists():
        return
    folder = _workspace_of(path)
    if not (folder / _REPLACED).exists():
        return
    with suppress(OSError), Claims() as claims:  # a reader may lack the permission to write
        claims.take(folder / CLAIM, wait=True)  # a process that is just replacing the folder ends first
        _restore(path)


def remove_abandoned(folder: Path) -> None:
    """Removes the workspaces of killed processes from a folder."""
    for left in folder.glob(f".*{SUFFIX}"):
        with Claims() as claims:
            claim = left / CLAIM
            with suppress(FileNotFoundError):  # its owner has just removed it
                if claims.take(claim, wait=False) and claims.excludes_others(claim):
                    _restore(_destination_of(left))
                    shutil.rmtree(left, ignore_errors=True)


def _restore(path: Path) -> None:
    replaced = _workspace_of(path) / _REPLACED
    if not path.exists() and replaced.exists():
        replaced.rename(path)


def _workspace_of(path: Path) -> Path:
    return path.with_name(f".{path.name}{SUFFIX}")


def _destination_of(folder: Path) -> Path:
    return folder.with_name(folder.name.removeprefix(".").removesuffix(SUFFIX))


def _claim(claims: Claims, claim: Path, path: Path, *, wait: bool) -> None:
    while True:
        claim.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # its last owner has just removed the folder
            if wait:
                claims.take(claim, wait=True)
            else:
                claims.hold(claim, path)
            return


def _clear(folder: Path) -> None:
    """Removes what killed processes left in a workspace."""
    for left in folder.iterdir():
        if left.name in (CLAIM, RESUMABLE):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders in one step; returns False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))
