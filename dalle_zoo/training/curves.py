"""Curves of a run as one CSV file that a resumed run continues."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dalle_zoo.files import atomic_write
from dalle_zoo.plots import CURVES, read_rows

FIRST_COLUMNS = ("step", "epoch")


class CurveLogger(Logger):
    """Appends each row of metrics to a CSV file, on disk as soon as it is logged.

    Lightning's logger starts a file per resume, and rewrites the file in place for a new column, so that a killed run
    can lose all rows. Here a file with another header replaces the old one atomically.

    Args:
        run: Folder of the run.
    """

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.path = run / CURVES
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Name of the folder of the curves."""
        return self.path.parent.name

    @property
    def version(self) -> None:
        """None: all parts of a run have the same curves."""
        return

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return str(self.path.parent.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: config.yaml has all settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Appends a row; a metric that is new adds a column."""
        row = {"step": 0 if step is None else step, **{name: float(value) for name, value in metrics.items()}}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        if self._columns is None or not row.keys() <= set(self._columns):
            columns, rows = read_rows(self.path)
            self._columns = sorted({*columns, *row}, key=_column_order)
            self._rewrite(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines(self._columns, [row]))

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Removes the rows of a step and of later ones, which a run that resumes at this step logs again."""
        columns, rows = read_rows(self.path)
        if columns:
            self._columns = columns
            self._rewrite([row for row in rows if int(row["step"]) < step])

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        assert self._columns is not None
        with atomic_write(self.path) as temporary:
            temporary.write_text(_lines(self._columns, rows, header=True), encoding="utf-8", newline="")


def _column_order(name: str) -> tuple[int, str]:
    return (FIRST_COLUMNS.index(name) if name in FIRST_COLUMNS else len(FIRST_COLUMNS), name)


def _lines(columns: list[str], rows: Iterable[Mapping[str, Any]], header: bool = False) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
