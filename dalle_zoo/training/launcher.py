"""Ends the processes that a run has launched when the launching process ends."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHER = "DALLE_ZOO_LAUNCHER"
"""Variable of the environment with the id of the process that launches others, which inherit it."""
INTERVAL = 1.0
"""Seconds between checks of the parent process."""


@contextmanager
def tied_to_launcher() -> Iterator[None]:
    """Ends this process, inside the context, when the process that launched it as a rank has ended.

    A rank that is still connecting is not watched by `RankWatch` yet, and would wait for rank 0 for half an hour.
    """
    parent = os.environ.get(LAUNCHER, "")
    if parent.isdecimal() and "LOCAL_RANK" in os.environ:
        threading.Thread(target=_end_after, args=(int(parent),), name="launcher-watch", daemon=True).start()
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(LAUNCHER, None)


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    sys.stderr.write(f"\ndalle-zoo: the run ends: process {parent}, which launched this one, has ended\n")
    sys.stderr.flush()
    os._exit(1)
