"""The report of a study: measured shares with the published ones, agreement, strengths, and what was left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dalle_zoo.files import write_json
from dalle_zoo.results import Result, Score, scores_of
from dalle_zoo_eval.documents import Block, Bullets, Heading, Image, Paragraph, Table, write_document
from dalle_zoo_eval.plots import bar_figure
from dalle_zoo_eval.published import find_published
from dalle_zoo_eval.study.analysis import levels
from dalle_zoo_eval.study.results import FAMILY, metric_name
from dalle_zoo_eval.sweeps import measured_cell

PUBLISHED = "coco"
"""Table with the published studies."""


def write_study_report(results: Sequence[Result], out: Path) -> list[Path]:
    """Writes ``report.md``, ``report.html``, figures, and one result file per system.

    Args:
        results: Results of all systems, as `dalle_zoo_eval.study.results.study_results` returns them.
        out: Output folder; existing files are replaced.

    Returns:
        The files that were written, the two reports first.
    """
    names = [f"result-{number}-{_file_name(result)}.json" for number, result in enumerate(results, 1)]
    for name, result in zip(names, results, strict=True):
        write_json(out / name, result)
    return [*write_document(list(report_blocks(results)), out), *(out / name for name in names)]


def _file_name(result: Result) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", result["source"]["name"]).strip("-").lower()[:40] or "system"


def report_blocks(results: Sequence[Result]) -> Iterator[Block]:
    """Yields the report as a document."""
    first = results[0]
    protocol, raters = first["protocol"], first["source"]["raters"]
    yield Heading(1, str(protocol["title"]))
    yield Paragraph(
        f"Human study of {', '.join(protocol['systems'])}: {first['groups']['all']['captions']} captions, "
        f"{protocol['votes']} votes per caption and question, {raters['voted']} raters of whom {raters['excluded']} "
        f"are excluded. {protocol['rule']}"
    )
    yield Paragraph(
        "In brackets: 95 % bootstrap intervals over captions. A share is that of captions for which a system receives "
        "that number of votes. Shares of different pairs of systems or captions are not comparable; published ones "
        "show how clear a preference others have found."
    )
    for question in protocol["questions"]:
        yield Heading(2, question["text"])
        yield _shares(results, metric_name(question["id"]))
        if figure := _figure(results, metric_name(question["id"])):
            yield figure
        yield from _other_scores(results, question["id"])
    yield Heading(2, "What was left out")
    yield Bullets([str(line) for line in first["left_out"]] or ["nothing"])


def _shares(results: Sequence[Result], metric: str) -> Table:
    """Returns measured rows, then the published ones."""
    rows = [
        [result["source"]["name"], score.part or "", measured_cell(result, score), str(score.samples), "this study"]
        for result in results
        for score in scores_of(result)
        if score.metric == metric
    ]
    measured = len(rows)
    for row in find_published(PUBLISHED).comparable_rows(metric, FAMILY, deduplicated=False):
        value = f"{'~' if row.approximate else ''}{row.value:.1f}"
        rows.append([row.system, row.setting, value, row.note or "–", f"{row.source} [{row.marks}]"])
    return Table(["system", "setting", "share, %", "captions", "source"], rows, frozenset(range(measured)))


def _figure(results: Sequence[Result], metric: str) -> Image | None:
    """Returns the bars of figure 7: the share of captions by level of agreement."""
    shown = levels(results[0]["protocol"]["votes"])
    bars: dict[str, dict[str, float]] = {name: {} for name in shown}
    for result in results:
        for score in scores_of(result):
            against, _, name = (score.part or "").rpartition(", ")
            if score.metric == metric and name in shown:
                bars[name][f"{result['source']['name']}\n{against}"] = 100 * score.value
    if not bars or not next(iter(bars.values())) or len(bars) > 5 or len(next(iter(bars.values()))) > 8:
        return None  # more bars than a figure can show; the table has all of them
    png = bar_figure(bars, title=f"Votes, {metric.removeprefix('human_')}", score="captions, %")
    return Image(f"{metric.replace('_', '-')}.png", png, f"Share of captions by votes, {metric}")


def _other_scores(results: Sequence[Result], question: str) -> Iterator[Block]:
    """Yields agreement, side bias and strengths."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for result in results:
        for score in scores_of(result):
            if score.metric in (f"agreement_{question}", f"side_bias_{question}", f"strength_{question}"):
                rows.setdefault(*_row(result, score))
    if rows:
        yield Table(["", "systems", "value"], list(rows.values()))


def _row(result: Result, score: Score) -> tuple[tuple[Any, ...], list[str]]:
    """Returns what a row shows, and its key: agreement is that of a pair, the side bias that of the study."""
    spec, name = result["metrics"][score.metric], str(result["source"]["name"])
    pair = [name, *([score.part.removeprefix("against ")] if score.part else [])]
    systems = "all" if score.metric.startswith("side_bias") else " and ".join(pair)
    label = f"{spec['label']}{', %' if spec['unit'] else ''}"
    key = (score.metric, *(("all",) if systems == "all" else sorted(pair)))
    return key, [label, systems, measured_cell(result, score)]
