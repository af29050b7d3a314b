"""Result files: read, checked, and held against each other before anything is made of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dalle_zoo.registry import suggest
from dalle_zoo_eval.protocol import FID_FAMILIES, METRICS

FRECHET = "frechet"
"""Fréchet distance between features of a network that is not Inception; never called FID."""
AGREEING = (
    "protocol.name",
    "protocol.image",
    "protocol.is_splits",
    "protocol.captions.exclusions",
    "benchmark.sha256",
    "benchmark.excluded",
    "benchmark.exclusions_sha256",
)
"""What results must have in common to stand in one table."""


class ResultError(ValueError):
    """A result file that cannot be used, or files that do not belong together; the message names them."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured score."""

    metric: str
    """Of `protocol.METRICS`, or `FRECHET`."""
    family: str
    """Network that it was measured with."""
    value: float
    """The score."""
    samples: int
    """Images that were measured."""
    reference_samples: int | None = None
    """Images that they were compared with, where the metric compares."""
    blur: int = 0
    """Radius of the blur of both sides, pixels."""
    candidates: int | None = None
    """Images generated of a caption, of which the ranker chose one; None for images that nothing here has sampled."""
    interval: tuple[float, float] | None = None
    """Bootstrap interval."""
    std: float | None = None
    """Standard deviation over the parts of the samples."""
    at_infinity: float | None = None
    """The score extrapolated to infinitely many samples."""
    rank_deficient: bool = False
    """Whether there are no more samples than features, on one side: a Frechet distance is then far too high."""

    def __post_init__(self) -> None:
        known = (*METRICS, FRECHET)
        if self.metric not in known:
            raise ResultError(suggest("metric", str(self.metric), known))
        if self.metric == "fid" and self.family not in FID_FAMILIES:
            raise ResultError(f"a FID is of {' or '.join(FID_FAMILIES)}, got {self.family!r}: call it {FRECHET!r}")
        if not isinstance(self.family, str) or not self.family:
            raise ResultError(f"family must be the name of a network, got {self.family!r}")
        for name in ("value", "std", "at_infinity"):
            if getattr(self, name) is not None or name == "value":
                _number(name, getattr(self, name))
        for name, least in (("samples", 1), ("reference_samples", 1), ("blur", 0), ("candidates", 1)):
            value, optional = getattr(self, name), name in ("reference_samples", "candidates")
            complete = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not complete and not (optional and value is None):
                raise ResultError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not isinstance(self.rank_deficient, bool):
            raise ResultError(f"rank_deficient must be true or false, got {self.rank_deficient!r}")
        if self.interval is not None:
            if not isinstance(self.interval, tuple | list) or len(self.interval) != 2:
                raise ResultError(f"interval must be two numbers, got {self.interval!r}")
            for bound in self.interval:
                _number("interval", bound)

    @property
    def key(self) -> tuple[object, ...]:
        """What no two scores of a result share."""
        return self.metric, self.family, self.blur, self.candidates


@dataclass(frozen=True)
class Result:
    """A result file."""

    name: str
    """Name of the file in its folder, for messages."""
    data: dict[str, Any]
    """All that it holds."""
    scores: tuple[Score, ...]
    """Its scores."""

    @property
    def subject(self) -> str:
        """Name of what was measured."""
        return str(self.data["subject"]["name"])

    @property
    def protocol(self) -> dict[str, Any]:
        """Fields of the protocol."""
        values: dict[str, Any] = self.data["protocol"]
        return values

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """Record of every network by its name."""
        values: dict[str, dict[str, Any]] = self.data.get("networks") or {}
        return values

    def at(self, path: str) -> Any:
        """A field by its dotted path; None if it is not there."""
        value: Any = self.data
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_data(path: Path) -> Any:
    """Contents of a result file, of whatever kind.

    Raises:
        ResultError: It is not there, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ResultError(f"{path} is not valid JSON: {error}") from None


def read_result(path: Path) -> Result:
    """Reads a result file.

    Raises:
        ResultError: It is not there, is no result of this package, a score is wrong or stands twice, or a self-check
            failed.
    """
    data = read_data(path)
    try:
        return _result(f"{path.parent.name}/{path.name}", data)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None


def _result(name: str, data: Any) -> Result:
    expected = {"protocol": dict, "subject": dict, "benchmark": dict, "scores": list}
    for part, kind in expected.items():
        if not isinstance(data, dict) or not isinstance(data.get(part), kind):
            raise ResultError(f"has no {part}: expected a result file of dalle-zoo eval")
    for where in ("protocol.name", "subject.name", "benchmark.sha256"):
        part, _, key = where.partition(".")
        if not isinstance(data[part].get(key), str):
            raise ResultError(f"{where} must be text, got {data[part].get(key)!r}")
    failed = [str(check.get("name")) for check in data.get("selfcheck") or [] if not check.get("passed")]
    if failed:
        raise ResultError(f"the self-check failed ({', '.join(failed)}): its scores mean nothing; measure again")
    if not data["scores"]:
        raise ResultError("holds no score")
    known = [field.name for field in fields(Score)]
    scores = []
    for number, entry in enumerate(data["scores"], 1):
        try:
            scores.append(Score(**{key: value for key, value in entry.items() if key in known}))
        except (ResultError, TypeError, AttributeError) as error:
            raise ResultError(f"score {number}: {error}") from None
    for repeated, count in Counter(score.key for score in scores).items():
        if count > 1:
            raise ResultError(f"the score {repeated} stands twice")
    return Result(name, data, tuple(scores))


def read_results(paths: Sequence[Path]) -> tuple[Result, ...]:
    """Reads result files that are to stand in one report.

    Raises:
        ResultError: One cannot be used, one is given twice, or they do not agree in what `AGREEING` lists or in the
            files of their networks.
    """
    if not paths:
        raise ResultError("no result file is given: name at least one")
    places = [Path(path).resolve() for path in paths]
    for path in places:
        if places.count(path) > 1:
            raise ResultError(f"{path} is given twice")
    results = tuple(read_result(Path(path)) for path in paths)
    first = results[0]
    for path, other in zip(paths, results, strict=True):
        pairs = {field: (first.at(field), other.at(field)) for field in AGREEING}
        # A ranker may be each model's own: its rows carry its digest in their family instead.
        for name in sorted((set(first.networks) & set(other.networks)) - {"ranker"}):
            pairs[f"sha256 of {name}"] = (first.networks[name].get("sha256"), other.networks[name].get("sha256"))
        for field, (one, two) in pairs.items():
            if one != two:
                raise ResultError(
                    f"{paths[0]} and {path} differ in {field}: {one!r} and {two!r}; they do not compare, "
                    "so make a report of each"
                )
    return results


def _number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ResultError(f"{name} must be a finite number, got {value!r}")
