"""Published scores as data: the system, how it was measured, and how reliable the number is.

The tables are stored in ``eval/published``. Scores may share a column only if metric and family agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.data_files import DataFileError, bundled_folder, check_keys, mapping, read_yaml

SCORE_FAMILIES = {
    "dmgan": "FID of the DM-GAN code: torchvision's ImageNet Inception with that code's own scaling of the input",
    "inception-2015": "the Inception network that TensorFlow published in 2015, as torch-fidelity and others use it",
    "stackgan-birds": "Inception trained on birds by StackGAN's authors; inception score on CUB only",
    "cogview": "CogView's own loss of the caption given the image",
    "human": "votes of people",
    "unknown": "code or network not stated",
}
"""What a score was measured with. Scores of two families are never comparable, nor are two of ``unknown``."""
PUBLISHED_METRICS = ("fid", "is", "clip_score", "caption_loss", "human_realism", "human_match", "human_quality")
"""Metrics of published scores; votes of people are in percent."""
MARKS = {
    "P": "read in the paper's text",
    "F": "read off a figure",
    "C": "read in published code or its README",
    "R": "computed",
    "S": "second-hand",
}
"""How a number is known."""
OVERLAPS = ("original", "deduplicated")
"""Whether the references include images that overlap with training data."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One published score."""

    system: str
    """Name, with the number of weights where it distinguishes systems."""
    setting: str
    """What it was trained on, or how it was prompted."""
    metric: str
    """One of `PUBLISHED_METRICS`."""
    family: str
    """One of `SCORE_FAMILIES`."""
    value: float
    """The score; percent for votes of people."""
    source: str
    """Where it is published."""
    marks: str
    """Letters of `MARKS`, separated by "/"."""
    blur: int = 0
    """Radius of the blur of both sides, pixels."""
    candidates: int | None = None
    """Images generated per caption, of which one was kept; None if not stated."""
    overlap: str | None = None
    """One of `OVERLAPS`; None if not stated."""
    std: float | None = None
    """Standard deviation over the parts of an inception score."""
    error: float | None = None
    """Largest error of reading the score off a figure."""
    approximate: bool = False
    """Whether the source gives it as approximate."""
    quoted: bool = False
    """Whether the source repeats a score of another source; figures omit such rows."""
    do_not_use: str = ""
    """Why the score is wrong. Such a row prevents that the score is added again; reports omit it."""
    note: str = ""
    """Anything else."""

    def __post_init__(self) -> None:
        for name, known in (("metric", PUBLISHED_METRICS), ("family", SCORE_FAMILIES)):
            if getattr(self, name) not in known:
                raise DataFileError(suggest(name, str(getattr(self, name)), known))
        if self.overlap is not None and self.overlap not in OVERLAPS:
            raise DataFileError(suggest("overlap", str(self.overlap), OVERLAPS))
        for name in ("system", "setting", "source", "marks", "do_not_use", "note"):
            value, empty = getattr(self, name), name in ("do_not_use", "note")
            if not isinstance(value, str) or not (value or empty):
                raise DataFileError(f"{name} must be text, got {value!r}")
        if not set(self.marks.split("/")) <= set(MARKS):
            raise DataFileError(f"marks must be of {', '.join(MARKS)}, separated by '/', got {self.marks!r}")
        for name in ("value", "std", "error"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and value >= 0) and not (value is None and name != "value"):
                raise DataFileError(f"{name} must be a number of at least 0, got {value!r}")
        for name, least in (("blur", 0), ("candidates", 1)):
            value = getattr(self, name)
            complete = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not complete and not (value is None and name == "candidates"):
                raise DataFileError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("approximate", "quoted"):
            if not isinstance(getattr(self, name), bool):
                raise DataFileError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def series(self) -> tuple[str, str, int | None, str | None, str]:
        """Fields that the rows of one line over the blur radius share."""
        return self.system, self.setting, self.candidates, self.overlap, self.source

    @property
    def key(self) -> tuple[object, ...]:
        """Fields that identify a row of a table."""
        return (*self.series, self.metric, self.family, self.blur)


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """All published scores on a dataset."""

    name: str
    """Name of the file."""
    title: str
    """Title, with the dataset."""
    samples: int | None
    """Number of samples of a score unless its note states another; None if not published."""
    rows: tuple[PublishedRow, ...]
    """The scores, in the order of the file."""

    def __post_init__(self) -> None:
        seen = set()
        for row in self.rows:
            if row.key in seen:
                raise DataFileError(f"{row.system} ({row.setting}): {row.metric} at blur {row.blur} appears twice")
            seen.add(row.key)

    def comparable_rows(self, metric: str, family: str, *, deduplicated: bool) -> tuple[PublishedRow, ...]:
        """Returns the published scores that may be listed with a measured one.

        Args:
            metric: Metric of the measured score.
            family: Its family; ``unknown`` is comparable with nothing.
            deduplicated: Whether overlapping images were excluded from its references.

        Returns:
            Rows with the same metric and family, and with the same set of references or an unstated one.
        """
        unwanted = "original" if deduplicated else "deduplicated"
        if family == "unknown":
            return ()
        return tuple(
            row
            for row in self.rows
            if (row.metric, row.family) == (metric, family) and row.overlap != unwanted and not row.do_not_use
        )


def list_published() -> list[str]:
    """Returns the names of the bundled tables."""
    return sorted(path.stem for path in bundled_folder("published").glob("*.yaml"))


def find_published(name: str) -> PublishedTable:
    """Returns a table by name.

    Raises:
        UnknownNameError: There is no such table; the message suggests the nearest name.
    """
    if name not in list_published():
        raise UnknownNameError(suggest("table of published scores", name, list_published()))
    return read_published(bundled_folder("published") / f"{name}.yaml")


def read_published(path: Path) -> PublishedTable:
    """Reads a table.

    Raises:
        DataFileError: A field is unknown, missing or wrong, or a score appears twice.
    """
    values = read_yaml(path)
    known = ("title", "samples", "groups")
    check_keys(values, known, str(path), required=known)
    try:
        if not isinstance(values["groups"], list):
            raise DataFileError(f"groups must be a list, got {values['groups']!r}")
        rows = [row for number, group in enumerate(values["groups"], 1) for row in _group(group, number)]
        return PublishedTable(
            name=path.stem,
            title=values["title"],
            samples=values["samples"],
            rows=tuple(rows),
        )
    except DataFileError as error:
        raise DataFileError(f"{path}: {error}") from None


def _group(group: object, number: int) -> list[PublishedRow]:
    """Returns the rows of a group: fields of the group, overridden by those of a row."""
    where = f"group {number}"
    shared = mapping(group, where)
    entries = shared.pop("rows", None)
    if not isinstance(entries, list) or not entries:
        raise DataFileError(f"{where}: rows must be a list of rows, got {entries!r}")
    rows = []
    for place, entry in enumerate(entries, 1):
        rows += _rows({**shared, **mapping(entry, where)}, f"{where}, row {place}")
    return rows


def _rows(values: dict[str, Any], where: str) -> list[PublishedRow]:
    """Returns the row of a mapping, or one row for each of its ``values`` over blur or candidates."""
    series, over = values.pop("values", None), values.pop("over", None)
    if series is not None and (over not in ("blur", "candidates") or not isinstance(series, dict) or not series):
        raise DataFileError(f"{where}: values must map numbers of blur or candidates (over) to scores, got {series!r}")
    several = [values] if series is None else [{**values, over: at, "value": value} for at, value in series.items()]
    names = [field.name for field in fields(PublishedRow)]
    needed = ("system", "setting", "metric", "family", "value", "source", "marks")
    for row in several:
        check_keys(row, names, where, required=needed)
    try:
        return [PublishedRow(**row) for row in several]
    except DataFileError as error:
        raise DataFileError(f"{where}: {error}") from None
