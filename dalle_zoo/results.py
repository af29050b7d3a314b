"""Result files of ``dalle-zoo eval``: their schema, and their scores as tables and lists. No torch.

A result file is a JSON object. What every reader may rely on:

| key | holds |
|---|---|
| ``protocol`` | all fields of the protocol |
| ``source`` | what was measured: ``kind`` ("model" or "images"), ``name``, ``weights_sha256``, ... |
| ``groups`` | by group: ``samples`` (real images), ``captions`` (that images were generated from), ``dataset``, ... |
| ``metrics`` | by metric: ``label``, ``unit``, ``format``, ``lower_is_better``, ``section``, ``parts``, ... |
| ``scores`` | one object per score, the fields of `Score` |
| ``targets`` | what the model was to reach: ``name``, ``required``, ``reached``, ``met`` |
| ``extractors`` | by extractor: ``sha256``, what else fixes its features, ``title`` if not used in generation |
| ``left_out`` | what was not measured, and why |
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dalle_zoo.files import FileError, read_json, try_read_json
from dalle_zoo.model_folder import CHECKSUMS
from dalle_zoo.registry import suggest
from dalle_zoo.result_schema import problem_of

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE / "_results", _PACKAGE.parent / "eval" / "results")
"""In a wheel the result files are inside the package; in a checkout they are in ``eval``."""
SUBFOLDER = "results"
"""Folder of the result files of a published model."""

Result = Mapping[str, Any]
"""Contents of a result file."""

IMAGE_SETS = {
    "real": "real images (ceiling)",
    "reconstructed": "reconstructions",
    "generated": "best of {candidates}",
    "candidates": "one image",
    "shuffled": "shuffled captions (floor)",
}
"""Image sets that a score may be of, and what people call them, from ceiling to floor.

``generated`` is the candidate that the ranker prefers; ``candidates`` is the mean over all candidates; ``shuffled``
compares the candidates with the targets of another caption."""


class ResultError(ValueError):
    """A result file that cannot be used; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured score."""

    metric: str
    """Name of the metric, a key of the result's ``metrics``."""
    value: float
    """The score."""
    samples: int
    """Images that were measured."""
    part: str | None = None
    """Part of the metric, such as ``top5``; None where it has one value."""
    family: str | None = None
    """Extractor of the features; None where the metric needs none."""
    group: str = "all"
    """Group of prompts."""
    images: str = "generated"
    """Image set, of `IMAGE_SETS`."""
    reference_samples: int | None = None
    """Images that they were compared with, where the metric compares."""
    blur: int = 0
    """Radius of the blur of both sides, pixels."""
    candidates: int | None = None
    """Images generated per caption; None for images that nothing here has generated."""
    interval: tuple[float, float] | None = None
    """Bootstrap interval."""
    std: float | None = None
    """Standard deviation over the parts of the samples."""
    at_infinity: float | None = None
    """The score extrapolated to infinitely many samples."""
    rank_deficient: bool = False
    """Whether there are no more samples than features, on one side: a Fréchet distance is then far too high."""

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
        """What no two scores of a result share."""
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
        ResultError: It is not there, is no result of this package, a score is wrong or repeated, or a self-check
            failed.
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
        Its scores.

    Raises:
        ResultError: It is no result, or a wrong one.
    """
    problem = problem_of(data, {field.name for field in fields(Score)})
    if problem is not None:
        raise ResultError(problem)
    failed = [str(check.get("name")) for check in data.get("selfcheck") or [] if not check.get("passed")]
    if failed:
        raise ResultError(f"the self-check failed ({', '.join(failed)}): its scores mean nothing; measure again")
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
    """Scores of a checked result."""
    return [_score(entry) for entry in result["scores"]]


def _score(entry: Mapping[str, Any]) -> Score:
    known = {field.name for field in fields(Score)}
    return Score(**{key: value for key, value in entry.items() if key in known})


# ---------------------------------------------------------------- labels and tables


def selected(selector: Mapping[str, Any], scores: Iterable[Score]) -> list[Score]:
    """Scores that have all fields of a selector, such as ``{metric: concept_accuracy, part: top5}``."""
    return [score for score in scores if all(getattr(score, name) == value for name, value in selector.items())]


def score_label(result: Result, score: Score) -> str:
    """What people call a score within its result: metric, part, family, image set and blur, and the unit.

    What all scores of the metric share, and the metric itself implies, is left out.
    """
    spec = result["metrics"][score.metric]
    siblings = [s for s in scores_of(result) if s.metric == score.metric]
    words = [spec["label"]]
    words.append(part_label(result, score))
    if len({s.family for s in siblings}) > 1 or len(spec["extractor"]) != 1:
        words.append(score.family or "")
    if len({s.images for s in siblings}) > 1 or (score.images == "generated" and (score.candidates or 1) > 1):
        words.append(images_label(score))
    if score.blur:
        words.append(f"blur {score.blur}")
    words.append(spec["unit"])
    return ", ".join(word for word in words if word)


def part_label(result: Result, score: Score) -> str:
    """What people call the part of a score, "" where its metric has one value; ``top5`` is "top 5" unless named."""
    if score.part is None:
        return ""
    return str(result["metrics"][score.metric]["parts"].get(score.part, re.sub(r"^top(\d+)$", r"top \1", score.part)))


def images_label(score: Score) -> str:
    """What people call the image set of a score."""
    if score.images == "generated" and score.candidates in (None, 1):
        return "generated images"
    return IMAGE_SETS[score.images].format(candidates=score.candidates)


def score_text(result: Result, score: Score) -> str:
    """A score as it is shown."""
    return value_text(result, score, score.value)


def value_text(result: Result, score: Score, value: float) -> str:
    """A value of the kind of a score as it is shown: shares in per cent where the label ends in "%"."""
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
    """Scores of a result, as card and report show them.

    Args:
        result: A checked result.
        cell: Text of a score.
        wanted: Which scores are shown.

    Returns:
        Section to rows of a label and one cell per group, in the order of the scores. What was not measured for any
        group has no row.
    """
    groups = list(result["groups"])
    tables: dict[str, dict[str, dict[str, str]]] = {"Samples": {}}
    for key, label in (("samples", "samples"), ("captions", "captions generated from")):
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


def group_tables(result: Result, cell: Callable[[Result, Score], str] = score_text) -> dict[str, list[list[str]]]:
    """Scores of metrics that have tables by group: a table per part, with a row per group.

    Args:
        result: A checked result.
        cell: Text of a score.

    Returns:
        Title to a head and rows: a column per image set from ceiling to floor, and, where the metric says which is the
        ceiling, the share of it that the generated images reach. Groups in which nothing was measured have no row.
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
    """Head and rows of a table of one part."""
    found = {images: score for row in rows.values() for images, score in row.items()}
    sets = [images for images in IMAGE_SETS if images in found]
    ceiling = result["metrics"][next(iter(found.values())).metric].get("relative_to") or ""
    shares = [images for images in ("generated", "candidates") if images in sets and ceiling in sets]
    of = f"share of {IMAGE_SETS[ceiling]}" if shares else ""
    table = [["", *(images_label(found[s]) for s in sets), *(f"{images_label(found[s])}, {of}" for s in shares)]]
    for group in (group for group in result["groups"] if group in rows):
        row = rows[group]
        cells = [cell(result, row[images]) if images in row else "–" for images in sets]
        values = [(row.get(images), row.get(ceiling)) for images in shares]
        ratios = [f"{100 * a.value / b.value:.0f} %" if a and b and b.value else "–" for a, b in values]
        table.append([group, *cells, *ratios])
    return table


def _order(result: Result, score: Score) -> tuple[Any, ...]:
    """Place of a score in tables: by metric, family, part, and image set from ceiling to floor."""
    spec, metrics, sets = result["metrics"][score.metric], list(result["metrics"]), list(IMAGE_SETS)
    parts = list(spec["parts"])
    part = parts.index(score.part) if score.part in parts else len(parts)
    place = list(result["groups"]).index(score.group)
    return metrics.index(score.metric), score.family or "", part, score.part or "", sets.index(score.images), place


# ---------------------------------------------------------------- what was measured of a model


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and what it was measured on."""

    metric: str
    """Short name, such as "fid"."""
    label: str
    """What people call it."""
    protocol: str
    """Name of the protocol."""
    title: str
    """What the protocol says of itself."""
    split: str | None
    """Group of prompts; None where the protocol has one group."""
    value: float
    """The number."""
    settings: dict[str, Any]
    """What else fixes it: samples, candidates, blur, ...."""


def figures(result: Result) -> list[Figure]:
    """Headlines of a result file: the scores that its protocol names, or else all.

    Raises:
        ResultError: It is no result file of ``dalle-zoo eval``.
    """
    scores, protocol = check_result(result), result["protocol"]
    headlines: Sequence[Mapping[str, Any]] = protocol.get("headlines") or [{}]
    several = len(result["groups"]) > 1
    # By group where there are several, as people read them; in the order of the headlines within.
    places = {group: number for number, group in enumerate(result["groups"])}
    chosen = sorted((s for h in headlines for s in selected(h, scores)), key=lambda s: places[s.group])
    found = []
    for score in chosen:
        settings = {"samples": score.samples, "candidates": score.candidates, "blur": score.blur or None}
        if score.images != "real":
            sampling = protocol.get("sampling") or {}
            settings |= {"seed": protocol.get("seed"), "temperature": sampling.get("temperature")}
        found.append(
            Figure(
                metric="_".join(word for word in (score.metric, score.part) if word),
                label=score_label(result, score).removesuffix(", %"),  # the value is a share
                protocol=protocol["name"],
                title=protocol.get("title") or protocol["name"],
                split=score.group if several else None,
                value=score.value,
                settings={key: value for key, value in settings.items() if value is not None},
            )
        )
    return found


def measured_weights(result: Result) -> dict[str, str]:
    """sha256 of every file of weights that was measured, by its path in the model; empty where images were."""
    source = result.get("source")
    found = source.get("weights_sha256") if isinstance(source, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def fits(result: Result, listed: Mapping[str, str]) -> bool:
    """Whether a result was measured with the weights that the ``sha256.json`` of a model lists."""
    current = {name: digest for name, digest in listed.items() if name.endswith(".safetensors")}
    return bool(current) and measured_weights(result) == current


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files that were measured with the weights of a model: its own, and those that come with the package.

    Returns:
        Contents by file name. What is no result file, or belongs to other weights, is left out.
    """
    listed = try_read_json(folder / CHECKSUMS) or {}
    found = {}
    for root in (*_ROOTS, folder / SUBFOLDER):
        for path in sorted(root.glob("*.json")):
            result = try_read_json(path)
            if result is not None and fits(result, listed):
                found[path.name] = result
    return found


def target_status(result: Result, met: bool) -> str:
    """Whether a target was reached, in words; a result of other values than the protocol's does not say."""
    if result["protocol"].get("overridden"):
        return "not the protocol's numbers"
    return "reached" if met else "not reached"
