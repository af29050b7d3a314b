"""Results of a model: headlines of result files, and the result files that belong to its weights. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_zoo.files import try_read_json
from dalle_zoo.model_folder import CHECKSUMS
from dalle_zoo.results import Result, check_result, score_label, selected

_PACKAGE = Path(__file__).parent
_ROOTS = (_PACKAGE / "_results", _PACKAGE.parent / "eval" / "results")
"""Folders of bundled result files: inside the package in a wheel, in ``eval`` in a checkout."""
SUBFOLDER = "results"
"""Folder of the result files of a published model."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A score for lists of models, with the settings of its evaluation."""

    metric: str
    """Short name, such as "fid"."""
    label: str
    """Label of the score."""
    protocol: str
    """Name of the protocol."""
    title: str
    """Title of the protocol."""
    split: str | None
    """Group of prompts; None if the protocol has only one group."""
    value: float
    """The score."""
    settings: dict[str, Any]
    """Other values that determine it: samples, candidates, blur, ..."""


def figures(result: Result) -> list[Figure]:
    """Returns the headlines of a result: the scores that its protocol selects, or else all.

    Raises:
        ResultError: It is not a result of ``dalle-zoo eval``.
    """
    scores, protocol = check_result(result), result["protocol"]
    headlines: Sequence[Mapping[str, Any]] = protocol.get("headlines") or [{}]
    several = len(result["groups"]) > 1
    # By group, and within a group in the order of the headlines.
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
    """Returns the sha256 of the evaluated weights by path in the model; empty for a folder of images."""
    source = result.get("source")
    found = source.get("weights_sha256") if isinstance(source, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def listed_weights(listed: Mapping[str, str]) -> dict[str, str]:
    """Returns the sha256 of the weights among all files that the ``sha256.json`` of a model lists."""
    return {name: digest for name, digest in listed.items() if name.endswith(".safetensors")}


def fits(result: Result, listed: Mapping[str, str]) -> bool:
    """Returns whether a result was measured with the weights that the ``sha256.json`` of a model lists."""
    current = listed_weights(listed)
    return bool(current) and measured_weights(result) == current


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the results that were measured with the weights of a model: its own, and bundled ones.

    Returns:
        Contents by file name, without files that are no results or belong to other weights.
    """
    listed = try_read_json(folder / CHECKSUMS) or {}
    found = {}
    for root in (*_ROOTS, folder / SUBFOLDER):
        for path in sorted(root.glob("*.json")):
            result = try_read_json(path)
            if result is not None and fits(result, listed):
                found[path.name] = result
    return found
