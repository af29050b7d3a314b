"""Result files of GenEval 2, T2I-CompBench and EvalScope as result files of `dalle_zoo.results`."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.files import sha256_file
from dalle_zoo.inspection import code_version
from dalle_zoo.results import ResultError, Score, check_result
from dalle_zoo_eval.datasets.manifest import read_caption_file, read_jsonl
from dalle_zoo_eval.metrics.base import MetricSpec
from dalle_zoo_eval.metrics.estimates import Estimate, bootstrapped
from dalle_zoo_eval.provenance import digest

MOST_BYTES = 2**28
TITLES = {"geneval2": "GenEval 2", "t2i-compbench": "T2I-CompBench", "evalscope": "EvalScope"}


def import_result(
    layout: str, file: Path, *, name: str, prompts: Path | None = None, part: str = ""
) -> dict[str, Any]:
    """Reads a result file of another benchmark.

    | layout | file | prompts |
    |---|---|---|
    | ``geneval2`` | ``score_lists.json`` of ``evaluation.py`` | ``geneval2_data.jsonl``, required |
    | ``t2i-compbench`` | ``annotation_*/vqa_result.json`` | the prompts of the category, required |
    | ``evalscope`` | the report of a data set, JSON | not needed |

    Args:
        layout: As in `export_layout`.
        file: The result file.
        name: Name of the evaluated system.
        prompts: Prompts of the benchmark, over which intervals are computed.
        part: Category of T2I-CompBench, such as ``color``. Defaults to the name of the folder of the file.

    Returns:
        Contents of a result file, checked.

    Raises:
        ResultError: The file is not one of the benchmark, or does not fit the prompts.
    """
    if not name:
        raise ResultError("--name must be the name of the evaluated system, got an empty one")
    if prompts is None and layout != "evalscope":
        raise ResultError(f"intervals of {TITLES[layout]} are over its prompts: give their file with --prompts")
    values = _read(file)
    match layout:
        case "geneval2":
            assert prompts is not None
            scores = _geneval(values, prompts)
        case "t2i-compbench":
            assert prompts is not None
            scores = _compbench(values, prompts, part or file.parent.name)
        case _:
            scores = _evalscope(values)
    return _result(layout, file, name, scores, prompts)


def _read(file: Path) -> Any:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ResultError(f"{file} has more than {MOST_BYTES} bytes: expected a result file")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"{file} cannot be read as a result file: {error}") from None


def _geneval(values: Any, prompts: Path) -> list[Score]:
    """Scores of each question of each prompt: Soft-TIFA as arithmetic and geometric means, and by skill."""
    rows = [row for _, row in read_jsonl(prompts)]
    if not isinstance(values, list) or len(values) != len(rows) or not all(map(_are_shares, values)):
        raise ResultError(
            f"expected a list of {len(rows)} lists of scores from 0 to 1, one for each prompt of {prompts}"
        )
    skills: dict[str, list[float]] = defaultdict(list)
    for row, scores in zip(rows, values, strict=True):
        if _are_names(row.get("skills")) and len(row["skills"]) == len(scores):
            for skill in dict.fromkeys(row["skills"]):
                of_skill = [score for score, own in zip(scores, row["skills"], strict=True) if own == skill]
                skills[skill].append(sum(of_skill) / len(of_skill))
    means = [sum(scores) / len(scores) for scores in values]
    geometric = [math.prod(scores) ** (1 / len(scores)) for scores in values]
    parts = {"mean": means, "geometric mean": geometric, **{f"skill {name}": found for name, found in skills.items()}}
    return [_score("soft_tifa", part, found) for part, found in parts.items()]


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and value for value in values)


def _are_shares(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(_is_share(value) for value in values)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _compbench(values: Any, prompts: Path, part: str) -> list[Score]:
    """Scores of each image; the same number of images of each prompt follow each other."""
    count = len(read_caption_file(prompts))
    if not isinstance(values, list) or not values or len(values) % count:
        raise ResultError(
            f"expected a list with the same number of images for each of the {count} prompts of {prompts}"
        )
    try:
        scores = [float(row["answer"]) for row in values]
    except (TypeError, KeyError, ValueError):
        raise ResultError('expected objects such as {"question_id": 0, "answer": "0.5"}') from None
    if not all(map(_is_share, scores)):
        raise ResultError("answers must be from 0 to 1")
    by_prompt = torch.tensor(scores, dtype=torch.float64).reshape(count, -1).mean(1)
    return [_score("t2i_compbench", part, by_prompt.tolist(), samples=len(scores))]


def _evalscope(values: Any) -> list[Score]:
    """Means of the metrics of a report, of its first and its second schema; it has no single scores."""
    metrics = values.get("metrics") if isinstance(values, Mapping) else None
    if not isinstance(metrics, list) or not metrics or not all(isinstance(each, dict) for each in metrics):
        raise ResultError("expected a report of EvalScope with metrics")
    scores = []
    for metric in metrics:
        identity = metric["identity"] if isinstance(metric.get("identity"), dict) else {}
        name, score, count = metric.get("name") or identity.get("name"), metric.get("score"), metric.get("num")
        if not isinstance(name, str) or not isinstance(score, int | float) or not isinstance(count, int) or count < 1:
            raise ResultError(f"expected metrics with name, num and score, got {str(metric)[:100]}")
        scores.append(Score(metric="evalscope", part=name, value=float(score), samples=count, family="EvalScope"))
    return scores


def _score(metric: str, part: str, by_prompt: Sequence[float], *, samples: int | None = None) -> Score:
    found: Estimate = bootstrapped(torch.tensor(by_prompt, dtype=torch.float64))
    return Score(
        metric=metric, part=part, family=None, value=found.value, interval=(found.low, found.high),
        samples=samples or len(by_prompt),
    )  # fmt: skip


def _result(layout: str, file: Path, name: str, scores: Sequence[Score], prompts: Path | None) -> dict[str, Any]:
    unit: dict[str, Any] = {"unit": "%", "format": ".1f"} if layout != "evalscope" else {"format": ".4f"}
    specs = [
        MetricSpec(name="soft_tifa", label="Soft-TIFA", section="GenEval 2", **unit),
        MetricSpec(name="t2i_compbench", label="T2I-CompBench", **unit),
        MetricSpec(name="evalscope", label="", section="EvalScope", **unit),
    ]
    sha256 = digest([layout, sha256_file(prompts) if prompts is not None else None])
    count = max(score.samples for score in scores)
    result: dict[str, Any] = {
        "protocol": {"name": layout, "title": TITLES[layout]},
        "source": {"kind": "images", "name": name, "imported": file.name, "sha256": sha256_file(file)},
        "groups": {
            "all": {"samples": count, "captions": count, "dataset": {"name": TITLES[layout], "sha256": sha256}}
        },
        "extractors": {},
        "metrics": {spec.name: spec.record() for spec in specs if spec.name == scores[0].metric},
        "scores": [asdict(score) for score in scores],
        "left_out": [],
        "code_version": code_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    result = json.loads(json.dumps(result))
    check_result(result)
    return result
