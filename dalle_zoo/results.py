"""Result files of ``dalle-zoo eval``: their schema, and tables of their scores. No torch.

A result file is a JSON object with at least these keys:

| key | content |
|---|---|
| ``protocol`` | all fields of the protocol |
| ``source`` | what was evaluated: ``kind`` ("model" or "images"), ``name``, ``weights_sha256``, ... |
| ``groups`` | by group: ``samples`` (real images), ``captions`` (prompts of generated images), ``dataset``, ... |
| ``metrics`` | by metric: ``label``, ``unit``, ``format``, ``lower_is_better``, ``section``, ``parts``, ... |
| ``scores`` | one object per score, the fields of `Score` |
| ``targets`` | targets of the protocol: ``name``, ``required``, ``reached``, ``met`` |
| ``extractors`` | by extractor: ``sha256``, what determines its features, ``title`` if not used in generation |
| ``left_out`` | omitted scores and checks, with reasons |
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dalle_zoo.files import FileError, read_json
from dalle_zoo.registry import suggest
from dalle_zoo.result_schema import problem_of

Result = Mapping[str, Any]
"""Contents of a result file."""

IMAGE_SETS = {
    "real": "real images (ceiling)",
    "reconstructed": "reconstructions",
    "generated": "best of {candidates}",
    "candidates": "one image",
    "shuffled": "shuffled captions (floor)",
}
"""Image sets of scores and their labels, from the maximum (ceiling) to chance level (floor).

``generated`` is the candidate that the ranker prefers; ``candidates`` is the mean over all candidates; ``shuffled``
compares the candidates with the targets of another caption."""


class ResultError(ValueError):
    """A result file cannot be used; the message names it."""


COMPARE = "compare"
"""Protocol of ``dalle-zoo compare``, whose real images are the other one of two sets."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured score."""

    metric: str
    """Name of the metric, a key of the result's ``metrics``."""
    value: float
    """The score."""
    samples: int
    """Number of evaluated images."""
    part: str | None = None
    """Part of the metric, such as ``top5``; None if it has one value."""
    family: str | None = None
    """Extractor of the features; None if the metric needs none."""
    group: str = "all"
    """Group of prompts."""
    images: str = "generated"
    """Image set, of `IMAGE_SETS`."""
    reference_samples: int | None = None
    """Number of reference images; None if the metric has no reference."""
    blur: int = 0
    """Radius of the blur of both sides, pixels."""
    candidates: int | None = None
    """Number of images generated per caption; None for images that the model did not generate."""
    interval: tuple[float, float] | None = None
    """Bootstrap interval."""
    std: float | None = None
    """Standard deviation over splits or subsets of the samples."""
    at_infinity: float | None = None
    """The score extrapolated to infinitely many samples."""
    rank_deficient: bool = False
    """Whether a side has no more samples than features, which makes a Fréchet distance far too high."""

    def __post_init__(self) -> None:
        for name in ("metric", "group", "images"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ResultError(f"{name} must be text, got {getattr(self, name)!r}")
        for name in ("part", "family"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ResultError(f"{name} must be text or null, got {value!r}")
        if self.images not in IMAGE_SETS:
            raise ResultError(f"images must be one of {', '.join(IMAGE_SETS)}, got {self.images!r}")
        for name in ("value", "std", "at_infinity"):
            if getattr(self, name) is not None or name == "value":
                _check_number(name, getattr(self, name))
        for name, least in (("samples", 1), ("reference_samples", 1), ("blur", 0), ("candidates", 1)):
            value, optional = getattr(self, name), name in ("reference_samples", "candidates")
            if not (_is_integer(value) and value >= least) and not (optional and value is None):
                raise ResultError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.rank_deficient, bool):
            raise ResultError(f"rank_deficient must be true or false, got {self.rank_deficient!r}")
        if self.interval is not None:
            if not isinstance(self.interval, tuple | list) or len(self.interval) != 2:
                raise ResultError(f"interval must be two numbers, got {self.interval!r}")
            for bound in self.interval:
                _check_number("interval", bound)

    @property
    def key(self) -> tuple[object, ...]:
        """Fields that identify a score within a result."""
        return self.metric, self.part, self.family, self.group, self.images, self.blur, self.candidates


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ResultError(f"{name} must be a finite number, got {value!r}")


# ---------------------------------------------------------------- reading


def read_result(path: Path) -> dict[str, Any]:
    """Reads and checks a result file.

    Raises:
        ResultError: The file is missing or is not a result, a score is wrong or repeated, or a self-check failed.
    """
    try:
        data = read_json(path, "a result file of dalle-zoo eval")
    except FileError as error:
        raise ResultError(str(error)) from None
    try:
        check_result(data)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    return data


def check_result(data: Any) -> list[Score]:
    """Checks the contents of a result file.

    Returns:
        The scores.

    Raises:
        ResultError: The contents are not a valid result.
    """
    problem = problem_of(data, {field.name for field in fields(Score)})
    if problem is not None:
        raise ResultError(problem)
    failed = [str(check.get("name")) for check in data.get("selfcheck") or [] if not check.get("passed")]
    if failed:
        raise ResultError(f"the self-check failed ({', '.join(failed)}): its scores are meaningless; evaluate again")
    if not data["scores"]:
        raise ResultError("holds no score")
    scores = []
    for number, entry in enumerate(data["scores"], 1):
        try:
            score = _score(entry)
            for name, known in (("metric", data["metrics"]), ("group", data["groups"])):
                if getattr(score, name) not in known:
                    raise ResultError(suggest(name, getattr(score, name), known))
        except (ResultError, TypeError, AttributeError) as error:
            raise ResultError(f"score {number}: {error}") from None
        scores.append(score)
    for repeated, count in Counter(score.key for score in scores).items():
        if count > 1:
            raise ResultError(f"the score {repeated} is repeated")
    return scores


def scores_of(result: Result) -> list[Score]:
    """Returns the scores of a checked result."""
    return [_score(entry) for entry in result["scores"]]


def _score(entry: Mapping[str, Any]) -> Score:
    known = {field.name for field in fields(Score)}
    return Score(**{key: value for key, value in entry.items() if key in known})


# ---------------------------------------------------------------- labels and tables


def selected(selector: Mapping[str, Any], scores: Iterable[Score]) -> list[Score]:
    """Returns the scores that match a selector, such as ``{metric: concept_accuracy, part: top5}``."""
    return [score for score in scores if all(getattr(score, name) == value for name, value in selector.items())]


def score_label(result: Result, score: Score) -> str:
    """Returns the label of a score within its result: metric, part, family, image set, blur and unit.

    Fields that are the same in all scores of the metric and implied by the metric are left out.
    """
    spec = result["metrics"][score.metric]
    siblings = [s for s in scores_of(result) if s.metric == score.metric]
    words = [spec["label"]]
    words.append(part_label(result, score))
    if len({s.family for s in siblings}) > 1 or len(spec["extractor"]) != 1:
        words.append(score.family or "")
    if len({s.images for s in siblings}) > 1 or (score.images == "generated" and (score.candidates or 1) > 1):
        words.append(images_label(result, score))
    if score.blur:
        words.append(f"blur {score.blur}")
    words.append(spec["unit"])
    return ", ".join(word for word in words if word)


def part_label(result: Result, score: Score) -> str:
    """Returns the label of a score's part; empty without parts. ``top5`` is "top 5" unless it has a label."""
    if score.part is None:
        return ""
    return str(result["metrics"][score.metric]["parts"].get(score.part, re.sub(r"^top(\d+)$", r"top \1", score.part)))


def images_label(result: Result, score: Score) -> str:
    """Returns the label of a score's image set."""
    comparison = result["protocol"]["name"] == COMPARE
    if score.images == "generated" and score.candidates in (None, 1):
        return "evaluated images" if comparison else "generated images"
    if score.images == "real" and comparison:
        return f"{compared_with(result)} (reference)"
    return IMAGE_SETS[score.images].format(candidates=score.candidates)


def compared_with(result: Result) -> str:
    """Returns the name of the reference of a comparison of two sets."""
    return str(next(iter(result["groups"].values()))["dataset"].get("name", "reference"))


def score_text(result: Result, score: Score) -> str:
    """Returns a score as text."""
    return value_text(result, score, score.value)


def value_text(result: Result, score: Score, value: float) -> str:
    """Returns a value in the format of a score; shares are in percent if the label ends in "%"."""
    times = 100 if score_label(result, score).endswith("%") else 1
    form = result["metrics"][score.metric]["format"]
    try:
        return f"{value * times:{form}}"
    except (TypeError, ValueError):  # the file was not written by `dalle-zoo eval`
        raise ResultError(f"metrics.{score.metric}.format must be the format of a number, got {form!r}") from None


def score_tables(
    result: Result,
    cell: Callable[[Result, Score], str] = score_text,
    wanted: Callable[[Score], bool] = lambda _: True,
) -> dict[str, list[list[str]]]:
    """Returns the scores of a result as tables for cards and reports.

    Args:
        result: A checked result.
        cell: Returns the text of a score. Defaults to `score_text`.
        wanted: Returns whether a score is included. Defaults to all.

    Returns:
        Rows by section, each with a label and one cell per group, in the order of the scores.
    """
    groups = list(result["groups"])
    tables: dict[str, dict[str, dict[str, str]]] = {"Samples": {}}
    for key, label in _sample_labels(result).items():
        if any(result["groups"][group].get(key) for group in groups):
            tables["Samples"][label] = {group: str(result["groups"][group].get(key, "–")) for group in groups}
    for score in sorted(filter(wanted, scores_of(result)), key=lambda s: _order(result, s)):
        spec = result["metrics"][score.metric]
        if spec.get("by_group"):
            continue
        rows = tables.setdefault(spec["section"] or spec["label"], {})
        rows.setdefault(score_label(result, score), {})[score.group] = cell(result, score)
    return {
        section: [[label, *(cells.get(group, "–") for group in groups)] for label, cells in rows.items()]
        for section, rows in tables.items()
        if rows
    }


def _sample_labels(result: Result) -> dict[str, str]:
    """Returns the labels of the numbers of images and captions by their field."""
    if result["protocol"]["name"] == COMPARE:
        return {"captions": "evaluated images", "samples": f"images of {compared_with(result)} (reference)"}
    return {"samples": "samples", "captions": "captions generated from"}


def group_tables(result: Result, cell: Callable[[Result, Score], str] = score_text) -> dict[str, list[list[str]]]:
    """Returns the scores of metrics with tables by group: a table per part, with a row per group.

    Args:
        result: A checked result.
        cell: Returns the text of a score. Defaults to `score_text`.

    Returns:
        Head and rows by title, with a column per image set from ceiling to floor. If the metric states its ceiling,
        further columns have the share of it that generated images reach. Groups without scores have no row.
    """
    tables: dict[str, dict[str, dict[str, Score]]] = {}
    for score in sorted(scores_of(result), key=lambda s: _order(result, s)):
        spec = result["metrics"][score.metric]
        if spec.get("by_group"):
            families = {s.family for s in scores_of(result) if s.metric == score.metric}
            family = score.family if len(families) > 1 else None
            words = (spec["section"] or spec["label"], part_label(result, score), family, spec["unit"])
            rows = tables.setdefault(", ".join(word for word in words if word), {})
            rows.setdefault(score.group, {})[score.images] = score
    return {title: _group_table(result, rows, cell) for title, rows in tables.items()}


def _group_table(
    result: Result, rows: Mapping[str, Mapping[str, Score]], cell: Callable[[Result, Score], str]
) -> list[list[str]]:
    """Returns head and rows of the table of one part."""
    found = {images: score for row in rows.values() for images, score in row.items()}
    sets = [images for images in IMAGE_SETS if images in found]
    ceiling = result["metrics"][next(iter(found.values())).metric].get("relative_to") or ""
    shares = [images for images in ("generated", "candidates") if images in sets and ceiling in sets]
    of = f"share of {IMAGE_SETS[ceiling]}" if shares else ""
    labels = {images: images_label(result, found[images]) for images in sets}
    table = [["", *labels.values(), *(f"{labels[images]}, {of}" for images in shares)]]
    for group in (group for group in result["groups"] if group in rows):
        row = rows[group]
        cells = [cell(result, row[images]) if images in row else "–" for images in sets]
        values = [(row.get(images), row.get(ceiling)) for images in shares]
        ratios = [f"{100 * a.value / b.value:.0f} %" if a and b and b.value else "–" for a, b in values]
        table.append([group, *cells, *ratios])
    return table


def _order(result: Result, score: Score) -> tuple[Any, ...]:
    """Returns the sort key of scores in tables: metric, family, part, and image set from ceiling to floor."""
    spec, metrics, sets = result["metrics"][score.metric], list(result["metrics"]), list(IMAGE_SETS)
    parts = list(spec["parts"])
    part = parts.index(score.part) if score.part in parts else len(parts)
    place = list(result["groups"]).index(score.group)
    return metrics.index(score.metric), score.family or "", part, score.part or "", sets.index(score.images), place


def target_status(result: Result, met: bool) -> str:
    """Returns whether a target was reached, as text; undecided if values of the protocol were changed."""
    if result["protocol"].get("overridden"):
        return "not the protocol's numbers"
    return "reached" if met else "not reached"
