"""Published scores as data: which system, how it was measured, and how well we know it.

The tables lie in ``eval/published``. Scores may share a column only where metric and family agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dalle_zoo.registry import UnknownNameError, suggest
from dalle_zoo_eval.data_files import DataFileError, bundled_folder, check_keys, mapping, read_yaml

FAMILIES = {
    "dmgan": "FID of the DM-GAN code: torchvision's ImageNet Inception with that code's own scaling of the input",
    "inception-2015": "the Inception network that TensorFlow published in 2015, as torch-fidelity and others use it",
    "stackgan-birds": "Inception trained on birds by StackGAN's authors; inception score on CUB only",
    "cogview": "CogView's own loss of the caption given the image",
    "human": "votes of people",
    "unknown": "code or network not stated",
}
"""What a score was measured with. Scores of two families are never comparable, nor two of ``unknown``."""
METRICS = ("fid", "is", "clip_score", "caption_loss", "human_realism", "human_match", "human_quality")
"""Metrics of published scores; those of people in per cent."""
MARKS = {
    "P": "read in the paper's text",
    "F": "read off a figure",
    "C": "read in published code or its README",
    "R": "computed",
    "S": "second-hand",
}
"""How well a number is known."""
OVERLAPS = ("original", "deduplicated")
"""Whether images that overlap with training data are among the references."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """One published score."""

    system: str
    """Name, with the number of weights where it tells systems apart."""
    setting: str
    """What it was trained on, or how it was asked."""
    metric: str
    """One of `METRICS`."""
    family: str
    """One of `FAMILIES`."""
    value: float
    """The score; per cent for people."""
    source: str
    """Where it stands."""
    marks: str
    """Letters of `MARKS`, separated by "/"."""
    blur: int = 0
    """Radius of the blur of both sides, pixels."""
    candidates: int | None = None
    """Images generated of a caption, of which one was kept; None where it is not stated."""
    overlap: str | None = None
    """One of `OVERLAPS`; None where it is not stated."""
    std: float | None = None
    """Standard deviation over the parts of an inception score."""
    error: float | None = None
    """Largest error of reading it off a figure."""
    approximate: bool = False
    """Whether the source gives it as approximate."""
    quoted: bool = False
    """Whether the source repeats another's score; such rows stand in no figure."""
    do_not_use: str = ""
    """Why the score is wrong; it is listed here so that nobody adds it again, and stands in no report."""
    note: str = ""
    """Anything else."""

    def __post_init__(self) -> None:
        for name, known in (("metric", METRICS), ("family", FAMILIES)):
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
        """What rows of one line over the blur radius share."""
        return self.system, self.setting, self.candidates, self.overlap, self.source

    @property
    def key(self) -> tuple[object, ...]:
        """What no two rows of a table share."""
        return (*self.series, self.metric, self.family, self.blur)


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """All published scores of a benchmark."""

    name: str
    """Name of the file."""
    title: str
    """The benchmark."""
    samples: int | None
    """Samples behind a score unless its note says otherwise; None where the number is not published."""
    rows: tuple[PublishedRow, ...]
    """The scores, in the order of the file."""
    without_score: tuple[str, ...] = ()
    """Sentences on systems that have none."""

    def __post_init__(self) -> None:
        seen = set()
        for row in self.rows:
            if row.key in seen:
                raise DataFileError(f"{row.system} ({row.setting}): {row.metric} at blur {row.blur} stands twice")
            seen.add(row.key)

    def beside(self, metric: str, family: str, *, deduplicated: bool) -> tuple[PublishedRow, ...]:
        """Published scores that may be listed with a measured one.

        Args:
            metric: Metric of the measured score.
            family: Its family; ``unknown`` compares with nothing.
            deduplicated: Whether overlapping images were left out of its references.

        Returns:
            Rows of the same metric and family, and of the same set or of one that is not stated.
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
    """Names of the tables that come with the package."""
    return sorted(path.stem for path in bundled_folder("published").glob("*.yaml"))


def find_published(name: str) -> PublishedTable:
    """A table by name.

    Raises:
        UnknownNameError: There is none; the message has the nearest name.
    """
    if name not in list_published():
        raise UnknownNameError(suggest("table of published scores", name, list_published()))
    return read_published(bundled_folder("published") / f"{name}.yaml")


def read_published(path: Path) -> PublishedTable:
    """Reads a table.

    Raises:
        DataFileError: A field is unknown, missing or wrong, or a score stands twice.
    """
    values = read_yaml(path)
    known = ("title", "samples", "without_score", "groups")
    check_keys(values, known, str(path), required=known)
    try:
        for name in ("groups", "without_score"):
            if not isinstance(values[name], list):
                raise DataFileError(f"{name} must be a list, got {values[name]!r}")
        rows = [row for number, group in enumerate(values["groups"], 1) for row in _group(group, number)]
        return PublishedTable(
            name=path.stem,
            title=values["title"],
            samples=values["samples"],
            rows=tuple(rows),
            without_score=tuple(values["without_score"]),
        )
    except DataFileError as error:
        raise DataFileError(f"{path}: {error}") from None


def _group(group: object, number: int) -> list[PublishedRow]:
    """Rows of a group: what the group states, overridden by what a row states."""
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
    """The row that a mapping describes, or one for each of its ``values`` over blur or candidates."""
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
