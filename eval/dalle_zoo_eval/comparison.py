"""Reads the result files of one report, and checks that they belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_zoo.results import Result, ResultError, Score, read_result, scores_of
from dalle_zoo_eval.extractors import EXTRACTORS
from dalle_zoo_eval.metrics.frechet import FID_FAMILIES

AGREEING = ("protocol.name", "protocol.image")
"""Fields in which results must agree to share a table."""
AGREEING_OF_GROUPS = (
    "groups.{}.dataset.sha256",
    "groups.{}.dataset.excluded",
    "groups.{}.dataset.exclusions_sha256",
    "protocol.groups.{}.captions.exclusions",
)
"""The same for every group."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result in a report."""

    name: str
    """Name of the evaluated system, numbered if two results have the same name."""
    data: Result
    """Contents of the result file."""
    scores: tuple[Score, ...]
    """Scores of the result."""

    @property
    def groups(self) -> list[str]:
        """Names of its groups."""
        return list(self.data["groups"])

    def at(self, path: str) -> Any:
        """Returns a field by its dotted path; None if it is missing."""
        return _at(self.data, path)

    def of_group(self, path: str) -> Any:
        """Returns a field of the first group's record."""
        return _at(self.data["groups"][self.groups[0]], path)

    def rule(self, path: str) -> Any:
        """Returns a field of the first group's rule in the protocol."""
        groups: Mapping[str, Any] = self.at("protocol.groups") or {}
        return _at(groups.get(self.groups[0]) or {}, path)


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def measured(results: Sequence[Result]) -> list[Measured]:
    """Returns results with the names that a report uses."""
    names = [str(result["source"]["name"]) for result in results]
    numbered = [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]
    return [
        Measured(name=name, data=result, scores=tuple(scores_of(result)))
        for name, result in zip(numbered, results, strict=True)
    ]


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Reads result files for one report.

    Raises:
        ResultError: A file cannot be used or is given twice, or the results differ in the fields of `AGREEING`, in
            the options of their metrics, or in the files of their extractors.
    """
    if not paths:
        raise ResultError("no result file is given: give at least one")
    places = [Path(path).resolve() for path in paths]
    for path in places:
        if places.count(path) > 1:
            raise ResultError(f"{path} is given twice")
    results = [read_result(Path(path)) for path in paths]
    for path, result in zip(paths, results, strict=True):
        wrong = [s for s in scores_of(result) if s.metric == "fid" and s.family not in FID_FAMILIES]
        if wrong:
            raise ResultError(f"{path}: a FID must be of {' or '.join(FID_FAMILIES)}, got {wrong[0].family!r}")
    first = results[0]
    for path, other in zip(paths, results, strict=True):
        for field, one, two in _pairs(first, other):
            if one != two:
                raise ResultError(
                    f"{paths[0]} and {path} differ in {field}: {one!r} and {two!r}, so they cannot be "
                    "compared: write a report for each"
                )
    return list(results)


def _pairs(first: Result, other: Result) -> list[tuple[str, Any, Any]]:
    """Returns the fields that must agree, with both values."""
    fields = [*AGREEING, *(f.format(group) for group in first["groups"] for f in AGREEING_OF_GROUPS)]
    pairs = [(field, _at(first, field), _at(other, field)) for field in fields]
    pairs.insert(1, ("groups", list(first["groups"]), list(other["groups"])))
    for group in first["groups"]:
        rules = [
            {r["name"]: r for r in _at(result, f"protocol.groups.{group}.metrics") or []} for result in (first, other)
        ]
        for name in sorted(set(rules[0]) & set(rules[1])):
            pairs.append((f"options of {name}", rules[0][name].get("options"), rules[1][name].get("options")))
    # Each model may have its own ranker: its digest is part of the family of its scores instead.
    one, two = (result.get("extractors") or {} for result in (first, other))
    own = {spec.name for spec in EXTRACTORS.specs() if spec.model_folder}
    for name in sorted((set(one) & set(two)) - own):
        pairs.append((f"sha256 of {name}", one[name].get("sha256"), two[name].get("sha256")))
    return pairs
