"""Prepares a model folder for publication on the Hub: checks it, and renders its card from its files.

Everything is checked before anything is uploaded. The card is rendered: its text comes from ``record.json``, and its
results come from result files that were measured with exactly these weights. A card written by hand is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_zoo.cards import check_weights, license_id, render_any_card
from dalle_zoo.files import escape_surrogates, json_text, read_json, sha256_file
from dalle_zoo.hub import ENDINGS, check_hub_name, stamp_card
from dalle_zoo.model_folder import (
    CARD,
    CHECKSUMS,
    COMPONENTS,
    CONFIG,
    INDEX,
    RECORD,
    ModelFolderError,
    read_checksums,
    verify_checksums,
)
from dalle_zoo.model_results import SUBFOLDER, figures, results_of
from dalle_zoo.paths import user_path
from dalle_zoo.recipes import find_recipe
from dalle_zoo.results import Result


@dataclass(frozen=True)
class Publication:
    """Contents of a commit."""

    name: str
    """``organization/name``."""
    files: dict[str, Path | bytes]
    """Files to upload, or their contents, by their path in the repository."""

    @property
    def card(self) -> str:
        """The model card with its metadata."""
        content = self.files[CARD]
        assert isinstance(content, bytes)
        return content.decode("utf-8")

    def sizes(self) -> dict[str, int]:
        """Returns the size of every file in bytes."""
        return {p: len(f) if isinstance(f, bytes) else f.stat().st_size for p, f in sorted(self.files.items())}


def prepare(
    folder: str | Path,
    name: str,
    *,
    results: Sequence[str | Path] = (),
    runs: Sequence[str | Path] = (),
    recipes: Sequence[str] = (),
) -> Publication:
    """Checks a model folder and collects the files to publish; nothing is uploaded.

    Args:
        folder: The model. Its own ``results/`` are included. Files that its ``sha256.json`` does not list are not
            published.
        name: ``organization/name``.
        results: Further result files of ``dalle-zoo eval``. Defaults to none.
        runs: Folders of the training runs, whose resolved configuration is published. Defaults to none.
        recipes: Recipes, by name or file. Defaults to none.

    Raises:
        ModelFolderError: A file is missing, damaged or not listed, the record lacks the license or the training data,
            or a result was measured with other weights.
        ValueError: A file is not a result file, a run is not finished, or the folder contains a ``README.md`` that
            differs from the rendered card.
    """
    folder = user_path(folder, "folder")
    check_hub_name(name)
    if not (folder / INDEX).is_file():
        raise ModelFolderError(
            f"{folder} has no {INDEX}: expected a folder from save_pretrained or `dalle-zoo export`"
        )
    verify_checksums(folder)
    _check_record(folder)
    listed = read_checksums(folder)
    _check_components(folder, listed)
    files: dict[str, Path | bytes] = {path: folder / path for path in listed}
    measured = results_of(folder)
    for path in (*map(Path, results), *(folder / p for p in listed if p.startswith(f"{SUBFOLDER}/"))):
        result = read_json(path, "a result file of dalle-zoo eval")
        figures(result)  # raises an error for any other kind of file
        check_weights(folder, result)
        measured[path.name] = result
    files |= {f"{SUBFOLDER}/{file}": json_text(result).encode() for file, result in measured.items()}
    for run in map(Path, runs):
        files[f"runs/{_stage(run)}.yaml"] = run / "config.yaml"
    for recipe in recipes:
        path = find_recipe(recipe)
        files[f"recipes/{path.parent.name}-{path.name}"] = path
    known = {folder / path: digest for path, digest in listed.items()}
    digests = {p: (isinstance(f, Path) and known.get(f)) or _sha256(f) for p, f in sorted(files.items())}
    files[CHECKSUMS] = json_text(digests).encode()
    files[CARD] = _card(folder, name, list(measured.values())).encode()
    return Publication(name, files)


# ---------------------------------------------------------------- checks


def _check_record(folder: Path) -> None:
    record = read_json(folder / RECORD)
    for field, meaning in (("license", "SPDX identifier of the license"), ("data", "training data")):
        if str(record.get(field) or "unknown").startswith("unknown"):
            raise ModelFolderError(
                f"{folder / RECORD} does not state {field} ({meaning}), which is required for publication: save the "
                f"model again with save_pretrained(record=...) or `dalle-zoo export --{field} ...`"
            )


def _check_components(folder: Path, listed: Mapping[str, str]) -> None:
    for required in (INDEX, RECORD, CONFIG):
        if required not in listed:
            raise ModelFolderError(f"{folder / CHECKSUMS} does not list {required}: save the model again")
    for name in read_json(folder / INDEX):
        if not name.startswith("_") and not any(path.startswith(f"{name}/") for path in listed):
            raise ModelFolderError(f"{folder} has no {name}, which {INDEX} lists: save the model again")
    unsupported = [path for path in listed if not path.endswith(ENDINGS)]
    if unsupported:
        raise ModelFolderError(f"{folder} lists {unsupported[0]!r}: only {', '.join(ENDINGS)} are published")


def _stage(run: Path) -> str:
    stages = [path.name for path in run.glob("model/*") if path.name in COMPONENTS]
    if len(stages) != 1 or not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a finished run: expected config.yaml and model/<stage> of `dalle-zoo fit`")
    return stages[0]


def _sha256(file: Path | bytes) -> str:
    return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256_file(file)


# ---------------------------------------------------------------- the card


def _card(folder: Path, name: str, results: Sequence[Result]) -> str:
    """Renders the card with its metadata, and raises `ValueError` if the folder contains a different one."""
    from huggingface_hub import EvalResult, ModelCard

    record = read_json(folder / RECORD)
    card = ModelCard(escape_surrogates(render_any_card(folder, results, name)))
    data: Any = card.data
    data.license = license_id(str(record["license"])).lower()
    if data.license == "other":
        stated = str(record.get("license_name") or record["license"])
        data.license_name = re.sub(r"[^a-z0-9.+]+", "-", stated.lower()).strip("-")
    data.library_name, data.pipeline_tag, data.model_name = "dalle-zoo", "text-to-image", name if results else None
    data.eval_results = [
        EvalResult(
            task_type="text-to-image", dataset_type=figure.protocol, dataset_name=figure.title,
            dataset_split=figure.split, metric_type=figure.metric, metric_name=figure.label,
            metric_value=figure.value, metric_args=figure.settings,
        )
        for result in results for figure in figures(result)
    ] or None  # fmt: skip
    rendered, present = stamp_card(str(card)), folder / CARD
    if present.is_file() and present.read_bytes() != rendered.encode():
        raise ValueError(
            f"{present} differs from the card that is rendered for {name} from {RECORD} and the result files, which "
            f"is the only one that is published: put your text into the fields of {RECORD} with "
            f"save_pretrained(record=...), your numbers into result files of `dalle-zoo eval`, and delete {present}"
        )
    return rendered
