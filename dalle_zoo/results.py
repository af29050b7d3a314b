"""Result files of ``dalle-zoo eval`` as figures: what was measured of a model, for lists and cards. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_zoo.files import try_read_json

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE / "_results", _PACKAGE.parent / "eval" / "results")
"""In a wheel the result files travel inside the package; in a checkout they lie in ``eval``."""
SUBFOLDER = "results"
"""Where a published model holds its own."""

Result = Mapping[str, Any]
"""Contents of a result file."""

HEADLINES = {
    ("psnr",): "reconstruction PSNR, dB",
    ("bits", "right"): "bits per image token, right captions",
    ("concept_accuracy", "best", "top5"): "concept accuracy, top 5, best candidate",
}
"""Figures of a result of kind ``concepts`` that stand for the rest, and their names."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number and what it was measured on."""

    metric: str
    """Short name, such as "fid"."""
    label: str
    """What people call it, with the network that it was measured with."""
    protocol: str
    """Name of the protocol."""
    title: str
    """What the protocol says of itself."""
    split: str | None
    """Part of the data; None where the protocol has one part."""
    value: float
    """The number."""
    settings: dict[str, Any]
    """What else fixes it: samples, candidates, blur, …."""


def figures(result: Result) -> list[Figure]:
    """Figures of a result file of either kind: all scores, or the headlines of every split.

    Raises:
        ValueError: It is no result file of ``dalle-zoo eval``.
    """
    try:
        protocol = result["protocol"]
        common = {"protocol": protocol["name"], "title": protocol.get("title") or protocol["name"]}
        found = list(_of_scores(result, common) if "scores" in result else _of_splits(result, common))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a result file of dalle-zoo eval, but this has no {error}") from None
    if not found:
        raise ValueError("expected a result file of dalle-zoo eval, but this holds no figure")
    return found


def _of_scores(result: Result, common: Mapping[str, Any]) -> Iterator[Figure]:
    for score in result["scores"]:
        settings = {key: score[key] for key in ("samples", "candidates", "blur") if score.get(key) is not None}
        label = f"{score['metric']} ({score['family']})"
        yield Figure(
            metric=score["metric"], label=label, split=None, value=score["value"], settings=settings, **common
        )  # fmt: skip


def _of_splits(result: Result, common: Mapping[str, Any]) -> Iterator[Figure]:
    sampling = {key: result["protocol"].get(key) for key in ("seed", "candidates", "temperature")}
    for split, measured in result["splits"].items():
        for path, label in HEADLINES.items():
            value: Any = measured
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                settings = {"samples": measured["samples"], **sampling}
                metric = "_".join(path)
                yield Figure(metric=metric, label=label, split=split, value=value, settings=settings, **common)


def measured_weights(result: Result) -> dict[str, str]:
    """Sha256 of every file of weights that was measured, by its path in the model; empty where images were."""
    subject = result.get("model") or result.get("subject") or {}
    return dict(subject.get("weights_sha256") or {})


def fits(result: Result, listed: Mapping[str, str]) -> bool:
    """Whether a result was measured with the weights that the ``sha256.json`` of a model lists."""
    current = {name: digest for name, digest in listed.items() if name.endswith(".safetensors")}
    return bool(current) and measured_weights(result) == current


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files that were measured with the weights of a model: its own, and those that ship with the package.

    Returns:
        Contents by file name. What is no result file, or belongs to other weights, is left out.
    """
    listed = try_read_json(folder / "sha256.json")
    if listed is None:
        return {}
    found = {}
    for root in (*_ROOTS, folder / SUBFOLDER):
        for path in sorted(root.glob("*.json")):
            result = try_read_json(path)
            if result is not None and fits(result, listed):
                found[path.name] = result
    return found
