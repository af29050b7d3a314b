"""A progress bar over the tokens of a generation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from dalle_zoo.sampling import Callback, Progress


@contextmanager
def progress_bar(callback: Callback | None, *, shown: bool | None = None) -> Iterator[Callback | None]:
    """Yields a callback that advances a progress bar on standard error and calls another callback.

    Args:
        callback: Another callback; None for none.
        shown: Whether there is a bar. Defaults to whether standard error is a terminal.
    """
    if shown is None:
        shown = sys.stderr is not None and sys.stderr.isatty()
    if not shown:
        yield callback
        return
    with tqdm(unit="token", desc="sampling") as bar:

        def report(progress: Progress) -> None:
            bar.total = progress.total
            bar.update(progress.done - bar.n)
            if callback is not None:
                callback(progress)

        yield report
