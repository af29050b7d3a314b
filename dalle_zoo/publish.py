"""Publishing: a model folder becomes one commit on the Hub, with a card rendered from its files.

Everything is checked before anything is sent. Large files go first, one by one, and no reader sees them until the
commit names them all; so an upload that was interrupted changes nothing, and the next one sends only what did not
arrive.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dalle_zoo.cards import check_weights, license_id, render_any_card
from dalle_zoo.folders import INDEX, RECORD
from dalle_zoo.hub import CARD, CHECKSUMS, ModelFolderError, read_json, sha256_file, verify_checksums
from dalle_zoo.recipes import find_recipe
from dalle_zoo.remote import ENDINGS, HubError, is_hub_name
from dalle_zoo.results import SUBFOLDER, Result, figures, results_of

RENDERED = "<!-- Rendered by `dalle-zoo"
"""What our cards say of themselves; a card without it was written by hand."""
MEASURES = r"(?:FID|IS|KID|PSNR|CLIP|accuracy|precision|recall|perplexity|score|distance|loss|bits)"
NUMBER = r"[-−]?\d[\d,]*(?:\.\d+)?"


@dataclass(frozen=True)
class Publication:
    """What a commit will hold."""

    name: str
    """``organisation/name``."""
    files: dict[str, Path | bytes]
    """Files to send, or their contents, by their path in the repository."""

    @property
    def card(self) -> str:
        """The model card with its metadata."""
        content = self.files[CARD]
        assert isinstance(content, bytes)
        return content.decode("utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {p: len(f) if isinstance(f, bytes) else f.stat().st_size for p, f in sorted(self.files.items())}


def prepare(
    folder: str | Path,
    name: str,
    *,
    results: Sequence[str | Path] = (),
    runs: Sequence[str | Path] = (),
    recipes: Sequence[str] = (),
) -> Publication:
    """Checks a model folder and renders what is published with it; nothing is sent.

    Args:
        folder: The model. Its own ``results/`` and ``README.md`` are taken along; a card that was written by hand
            keeps its text, and may state no number that was not measured. Files that its list does not name stay.
        name: ``organisation/name``.
        results: More result files of ``dalle-zoo eval``.
        runs: Runs that made the parts, of which the resolved configuration is published.
        recipes: Recipes, by name or file.

    Raises:
        ModelFolderError: A file is missing or damaged, was not listed, or the record says too little.
        ValueError: A result belongs to other weights, or the card states a number that no result file holds.
    """
    folder = Path(folder)
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is no name on the Hub: expected organisation/name")
    if not (folder / INDEX).is_file():
        raise ModelFolderError(
            f"{folder} has no {INDEX}: expected a folder from save_pretrained or `dalle-zoo export`"
        )
    verify_checksums(folder)
    _check_record(folder)
    listed: dict[str, str] = read_json(folder / CHECKSUMS)
    _check_parts(folder, listed)
    files: dict[str, Path | bytes] = {path: folder / path for path in listed}
    measured = results_of(folder)
    for path in (*map(Path, results), *(folder / p for p in listed if p.startswith(f"{SUBFOLDER}/"))):
        result = read_json(path)
        figures(result)  # raises for another kind of file
        check_weights(folder, result)
        measured[path.name] = result
    files |= {f"{SUBFOLDER}/{file}": _json(result) for file, result in measured.items()}
    for run in map(Path, runs):
        files[f"runs/{_stage(run)}.yaml"] = run / "config.yaml"
    for recipe in recipes:
        path = find_recipe(recipe)
        files[f"recipes/{path.parent.name}-{path.name}"] = path
    known = {folder / path: digest for path, digest in listed.items()}
    digests = {p: (isinstance(f, Path) and known.get(f)) or _sha256(f) for p, f in sorted(files.items())}
    files[CHECKSUMS] = _json(digests)
    files[CARD] = _card(folder, name, list(measured.values())).encode("utf-8")
    return Publication(name, files)


def publish(
    publication: Publication, *, private: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Sends a model as one commit; a repository that is not there is made.

    Args:
        publication: From `prepare`.
        private: Whether a new repository is for its owners alone; an old one must be so already.
        revision: Branch to commit to, which is made where it is not there. Defaults to the main one.
        token: Of a user who may write. Defaults to the stored one.

    Returns:
        Address of the commit.

    Raises:
        HubError: The Hub refuses, or cannot be reached. What it held before is as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, name = HfApi(token=token), publication.name
    with _refusals(name):
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise HubError(f"{name} exists and is public: change that on the Hub, or leave --private away")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        head = api.model_info(name, revision=revision)
        there = {file.rfilename for file in head.siblings or []} - {".gitattributes"}
        if there - {CARD, "LICENSE"} and CHECKSUMS not in there:
            raise HubError(
                f"{name} holds other files than a model of dalle-zoo, which would be taken away: choose another name"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warnings while validating metadata")
            done = api.create_commit(
                name,
                [
                    *(CommitOperationAdd(path, file) for path, file in sorted(publication.files.items())),
                    *(CommitOperationDelete(path) for path in sorted(there - publication.files.keys())),
                ],
                commit_message=f"Model of dalle-zoo, {len(publication.files)} files",
                revision=revision,
                parent_commit=head.sha,  # refused if somebody else was quicker
            )
    return str(done.commit_url)


# ---------------------------------------------------------------- checks


def _check_record(folder: Path) -> None:
    record = read_json(folder / RECORD)
    for field, meaning in (("license", "SPDX identifier of the license"), ("data", "what it was trained on")):
        if str(record.get(field) or "unknown").startswith("unknown"):
            raise ModelFolderError(
                f"{folder / RECORD} states no {field} ({meaning}): nothing is published without. Save the model again "
                f"with it, save_pretrained(record=...) or `dalle-zoo export --{field} ...`"
            )


def _check_parts(folder: Path, listed: Mapping[str, str]) -> None:
    for required in (INDEX, RECORD, "config.json"):
        if required not in listed:
            raise ModelFolderError(f"{folder / CHECKSUMS} does not list {required}: save the model again")
    for part in read_json(folder / INDEX):
        if not part.startswith("_") and not any(path.startswith(f"{part}/") for path in listed):
            raise ModelFolderError(f"{folder} has no {part}, which {INDEX} names: save the model again")
    strange = [path for path in listed if not path.endswith(ENDINGS)]
    if strange:
        raise ModelFolderError(f"{folder} lists {strange[0]!r}: only {', '.join(ENDINGS)} are published")


def _stage(run: Path) -> str:
    stages = [path.name for path in run.glob("model/*") if path.is_dir()]
    if len(stages) != 1 or not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no finished run: expected config.yaml and model/<stage> of `dalle-zoo fit`")
    return stages[0]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _sha256(file: Path | bytes) -> str:
    return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256_file(file)


# ---------------------------------------------------------------- the card


def _card(folder: Path, name: str, results: Sequence[Result]) -> str:
    """Text and metadata of the card; one that was written by hand is checked and gets our metadata."""
    from huggingface_hub import EvalResult, ModelCard

    path = folder / CARD
    written = path.read_text(encoding="utf-8") if path.is_file() else ""
    if written and RENDERED not in written:
        unheld = unmeasured(written, results, [read_json(p) for p in (folder / RECORD, *folder.glob("*/config.json"))])
        if unheld:
            raise ValueError(
                f"{path} states numbers that no result file holds: {', '.join(unheld[:5])}. Measure them with "
                "`dalle-zoo eval` and give the file by --result, or take them out; put what is no measurement, such "
                "as a version, in backticks"
            )
    else:
        written = render_any_card(folder, results, name)
    card = ModelCard(written)
    data: Any = card.data
    record = read_json(folder / RECORD)
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
    return str(card)


def unmeasured(card: str, results: Sequence[Result], known: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """Numbers that a card states as measured and that no file holds, rounded or as a percentage.

    Decimal numbers, percentages, numbers in tables, in a ``model-index``, and behind the name of a measure count as
    stated. What stands in code, in comments and in addresses does not.

    Args:
        card: Markdown, with or without metadata.
        results: Contents of result files.
        known: Other files whose numbers may be stated: record and configurations.

    Example:
        >>> unmeasured("FID 12.3 at 64 pixels, with `torch 2.13`.", [])
        ['12.3']
    """
    held = [number for value in [*results, *known] for number in _numbers(value)]
    return [text for text in dict.fromkeys(_stated(card)) if not _is_held(text, held)]


def _stated(card: str) -> Iterator[str]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match:
        card = card[match.end() :]
        yield from re.findall(rf"^\s*(?:- )?value: *({NUMBER})", match[1], re.MULTILINE)
    text = re.sub(r"```.*?```|<!--.*?-->|`[^`\n]*`|\]\([^)]*\)|https?://\S+", " ", card, flags=re.DOTALL)
    for line in text.splitlines():
        if line.lstrip().startswith("|"):
            yield from re.findall(rf"(?<![\w.]){NUMBER}", line)
        else:
            yield from re.findall(r"(?<![\w.])[-−]?\d[\d,]*\.\d+", line)
            yield from re.findall(rf"(?<![\w.])({NUMBER})\s?%", line)
            yield from re.findall(rf"\b{MEASURES}\b\D{{0,20}}?({NUMBER})", line, re.IGNORECASE)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield float(value)


def _is_held(text: str, held: Sequence[float]) -> bool:
    plain = text.replace(",", "").replace("−", "-")
    half = 0.5 * 10.0 ** -len(plain.partition(".")[2]) * (1 + 1e-9)
    return any(abs(number * times - float(plain)) <= half for number in held for times in (1, 100))


# ---------------------------------------------------------------- the Hub


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turns the errors of the Hub's client into ones that say what to do."""
    from huggingface_hub import constants, errors

    where = f"{name} on {constants.ENDPOINT}"
    # What the HTTP library raises, which is not the same in every version of the client; and what an upload raises.
    no_answer = cast("tuple[type[Exception], ...]", (*errors.HfHubHTTPError.__bases__, RuntimeError))
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise HubError(f"{where} cannot be written to: HF_HUB_OFFLINE is set") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            raise HubError(
                f"{where} may not be written to with this token: `hf auth login` as a user of the organisation, with "
                "a token that may write"
            ) from error
        if status == 412:
            raise HubError(f"{where} got another commit meanwhile; nothing was changed: run the same again") from error
        raise HubError(f"{where} answered: {error}; the same command goes on where this one stopped") from error
    except no_answer as error:
        raise HubError(
            f"{where} did not answer ({error}): check the network; the same command goes on where this one stopped"
        ) from error
