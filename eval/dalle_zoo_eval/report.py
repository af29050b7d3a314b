"""Reports: scores of one or several results with published ones, as Markdown, HTML and figures.

All values come from result files and from the tables of published scores; nothing is computed here.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from dalle_zoo.files import atomic_write
from dalle_zoo.results import (
    COMPARE,
    IMAGE_SETS,
    Result,
    ResultError,
    Score,
    compared_with,
    group_tables,
    images_label,
    part_label,
    score_tables,
    target_status,
)
from dalle_zoo_eval.comparison import Measured, measured, read_results
from dalle_zoo_eval.details import COPIES, copies_blocks, provenance_blocks
from dalle_zoo_eval.documents import (
    Block,
    Bullets,
    Heading,
    Image,
    Paragraph,
    Table,
    field_text,
    to_html,
    to_markdown,
    write_files,
)
from dalle_zoo_eval.latex import to_latex
from dalle_zoo_eval.plots import bar_figure
from dalle_zoo_eval.protocol import ALL
from dalle_zoo_eval.provenance import IDENTITY
from dalle_zoo_eval.published import PublishedTable, find_published
from dalle_zoo_eval.score_rows import scores_csv
from dalle_zoo_eval.sweeps import deficient_note, footnote, legend, measured_cell, samples_text, sweep_blocks

FORMS = ("md", "html", "latex", "csv")
"""Formats of reports: ``report.md``, ``report.html``, ``report.tex`` with figures as PDF, and ``scores.csv``."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Output files of an evaluation."""

    result: Path
    """The result file."""
    folder: Path
    """Folder of report and image sheets."""

    @classmethod
    def of(cls, out: Path) -> Self:
        """Returns the output of a result file ``NAME.json`` with its report in the folder ``NAME``, or of a folder."""
        if out.suffix == ".json":
            return cls(result=out, folder=out.with_suffix(""))
        return cls(result=out / "result.json", folder=out)

    @classmethod
    def of_result(cls, path: Path) -> Self:
        """Returns the output to which a result file belongs."""
        return cls.of(path.parent if path.name == "result.json" else path)

    @property
    def identity(self) -> Path:
        """File that identifies the evaluation in the folder."""
        return self.folder / IDENTITY

    def sheets(self, result: Result) -> list[Path]:
        """Returns the sheets of the evaluation that exist."""
        names = [*(sheet_name(group) for group in result["groups"]), COPIES]
        return [self.folder / name for name in names if (self.folder / name).is_file()]


def sheet_name(group: str) -> str:
    """Returns the file name of a group's sheet of samples: generated images next to real ones."""
    return "samples.png" if group == ALL else f"samples-{group}.png"


def write_report(
    paths: Sequence[Path], out: Path | None = None, *, forms: Sequence[str] = FORMS[:2], names: Sequence[str] = ()
) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and their images, with the sheets of the evaluation.

    Nothing is written unless all result files can be used and belong together.

    Args:
        paths: Result files of ``dalle-zoo eval`` with the same protocol and datasets.
        out: Output folder; existing files are replaced. Defaults to the folder of the evaluation.
        forms: Formats of the report, of `FORMS`. LaTeX comes with the figures as PDF. Defaults to Markdown and HTML.
        names: Name of each system. Defaults to those in the results.

    Returns:
        The files that were written, the reports first.

    Raises:
        ResultError: A result file or a sheet cannot be used, the results do not belong together, or there are
            several results and no output folder.
    """
    if len(paths) > 1 and out is None:
        raise ResultError("a report of several results needs a folder: give --out DIR")
    results, outputs = read_results(paths), [Output.of_result(Path(path)) for path in paths]
    if names:
        if len(names) != len(results):
            raise ResultError(f"there are {len(results)} results and {len(names)} names: give --name once for each")
        results = [{**r, "source": {**r["source"], "name": n}} for r, n in zip(results, names, strict=True)]
    sheets = [sheet for output, result in zip(outputs, results, strict=True) for sheet in output.sheets(result)]
    return write_report_of(results, out or outputs[0].folder, sheets=sheets, forms=forms)


def write_report_of(
    results: Sequence[Result], out: Path, *, sheets: Sequence[Path] = (), forms: Sequence[str] = FORMS[:2]
) -> list[Path]:
    """Writes the report of loaded results, as `write_report`.

    Args:
        results: Results that belong together.
        out: Output folder.
        sheets: PNG files to show; those in other folders are copied.
        forms: Formats of the report.
    """
    if out.exists() and not out.is_dir():
        raise ResultError(f"out must be a folder, got the file {out}")
    shown: list[Image] = []
    for path in sheets:
        shown.append(read_sheet(path, taken=[image.name for image in shown]))
    blocks, texts = report_blocks(results, shown), {}
    for form in forms:
        match form:
            case "md":
                texts["report.md"] = to_markdown(blocks)
            case "html":
                texts["report.html"] = to_html(blocks)
            case "latex":
                texts["report.tex"] = to_latex([*_head(results), *_scores_and_notes(measured(results))])
            case _:
                texts["scores.csv"] = scores_csv(measured(results))
    files = write_files(texts, blocks, out)
    for block in blocks if "latex" in forms else ():
        if isinstance(block, Image) and block.vector is not None:
            with atomic_write((out / block.name).with_suffix(".pdf")) as aside:
                aside.write_bytes(block.vector())
            files.append((out / block.name).with_suffix(".pdf"))
    return files


def summary(results: Sequence[Result]) -> str:
    """Returns only targets and tables, as Markdown, for the terminal."""
    blocks = _scores_and_notes(measured(results))
    return to_markdown([block for block in blocks if not isinstance(block, Image)])


def report_blocks(results: Sequence[Result], sheets: Sequence[Image] = ()) -> list[Block]:
    """Returns the report as a document.

    Args:
        results: Results that belong together.
        sheets: Images of samples.
    """
    systems = measured(results)
    blocks = [*_head(results), *_scores_and_notes(systems)]
    if sheets:
        text = "In each pair, the left image is generated and the right one is real; a folder of images has no pairs."
        if results[0]["protocol"]["name"] == COMPARE:
            text = "The images of both sides, in the order of their names; they are not paired."
        blocks += [Heading(2, "Images"), Paragraph(text), *sheets]
    return [*blocks, *provenance_blocks(systems)]


def _head(results: Sequence[Result]) -> list[Block]:
    systems, protocol = measured(results), results[0]["protocol"]
    title = str(protocol.get("title") or protocol["name"])
    if protocol["name"] == COMPARE:
        title = f"{' and '.join(system.name for system in systems)} against {compared_with(results[0])}"
    return [
        Heading(1, title),
        Paragraph(f"Protocol {protocol['name']}. Measured: {', '.join(system.name for system in systems)}."),
        Bullets([str(note) for note in protocol.get("notes") or []]),
    ]


def _scores_and_notes(systems: Sequence[Measured]) -> list[Block]:
    blocks = [*_targets(systems), *_score_blocks(systems), *copies_blocks(systems)]
    for system in systems:
        name = f"{system.name}: " if len(systems) > 1 else ""
        blocks.append(Bullets([f"{name}{line}" for line in system.data.get("notes") or []]))
    return blocks


# ---------------------------------------------------------------- scores


def _targets(systems: Sequence[Measured]) -> Iterator[Block]:
    for system in systems:
        heading = "Targets" if len(systems) == 1 else f"Targets, {system.name}"
        if rows := system.data.get("targets"):
            yield Heading(2, heading)
            cells = [
                [t["name"], field_text(t["required"]), f"{t['reached']:.3f}", target_status(system.data, t["met"])]
                for t in rows
            ]
            yield Table(["to reach", "at least", "measured", "status"], cells)
        if overridden := system.at("protocol.overridden"):
            yield Paragraph(f"{system.name} was measured with values that differ from the protocol:")
            yield Bullets(overridden)


def _score_blocks(systems: Sequence[Measured]) -> Iterator[Block]:
    """Yields swept metrics of a protocol with one group by axis, with published scores; all others in tables."""
    tables = [find_published(name) for name in systems[0].at("protocol.published") or ()]
    swept: dict[tuple[str, str], None] = {}
    if len(systems[0].groups) == 1:
        for system in systems:
            specs = system.data["metrics"]
            own = [s for s in system.scores if specs[s.metric]["sweep"] and s.images == "generated"]
            points = Counter((s.metric, s.family or "") for s in own)
            # One point that is compared with no published score is a row of the other tables.
            swept |= {pair: None for pair, count in points.items() if count > 1 or tables}
    for metric, family in sorted(swept, key=lambda pair: (_place(systems, pair[0]), pair[1])):
        yield from sweep_blocks(systems, tables, metric, family)
    yield from _group_tables(systems)
    yield from _tables(systems, tables, swept)


def _place(systems: Sequence[Measured], metric: str) -> int:
    names = list(dict.fromkeys(name for system in systems for name in system.data["metrics"]))
    return names.index(metric)


def _tables(
    systems: Sequence[Measured], tables: Sequence[PublishedTable], swept: dict[tuple[str, str], None]
) -> Iterator[Block]:
    """Yields one table per section: one row per score, one column per result and group."""
    marked: dict[str, None] = {}
    shown: list[Score] = []

    def wanted(score: Score) -> bool:
        return score.images != "generated" or (score.metric, score.family or "") not in swept

    columns: list[str] = []
    sections: dict[str, dict[str, list[str]]] = {}
    for system in systems:

        def cell(result: Result, score: Score, system: Measured = system) -> str:
            shown.append(score)
            # With several groups or other image sets, no number of samples is expected.
            if len(system.groups) > 1 or score.images != "generated":
                return measured_cell(result, score)
            text, comparable = samples_text(system, tables, [score])
            if not comparable:
                marked[f"{system.name}: {text}"] = None
            return measured_cell(result, score, comparable=comparable)

        several, width = len(system.groups) > 1, len(system.groups)
        names = system.groups if several else [system.name]
        columns += [f"{system.name}, {name}" if several and len(systems) > 1 else name for name in names]
        for section, rows in score_tables(system.data, cell, wanted).items():
            for label, *cells in rows:
                row = sections.setdefault(section, {}).setdefault(label, [])
                row += ["–"] * (len(columns) - width - len(row)) + cells
    for section, table in sections.items():
        yield Heading(2, section)
        yield Table(
            ["", *columns], [[label, *row, *["–"] * (len(columns) - len(row))] for label, row in table.items()]
        )
        yield from _section_remarks(systems, section)
    if text := legend(shown):
        yield Paragraph(text.strip())
    yield from footnote(list(marked))
    yield from deficient_note(shown)


def _group_tables(systems: Sequence[Measured]) -> Iterator[Block]:
    """Returns tables with a row per group, and bar charts of the same scores."""
    for system in systems:
        heading = "" if len(systems) == 1 else f", {system.name}"
        shown = [s for s in system.scores if system.data["metrics"][s.metric].get("by_group")]
        for title, (head, *rows) in group_tables(system.data, measured_cell).items():
            yield Heading(2, f"{title}{heading}")
            yield Table(head, rows)
        if shown:
            yield Paragraph(legend(shown).strip())
        if len(systems) == 1:
            for name in dict.fromkeys(score.metric for score in shown):
                yield from _bars(system, name, system.data["metrics"][name])


def _section_remarks(systems: Sequence[Measured], section: str) -> Iterator[Block]:
    """Yields the remarks of the metrics of a section, and the bar charts of those that have one."""
    for system in systems:
        for name, spec in system.data["metrics"].items():
            if (spec["section"] or spec["label"]) != section:
                continue
            if remark := spec.get("remark"):
                yield Paragraph(remark)
            if spec["bars"] and len(system.groups) > 1 and len(systems) == 1:
                yield from _bars(system, name, spec)


def _bars(system: Measured, metric: str, spec: dict[str, Any]) -> Iterator[Image]:
    """Yields the bar charts of a metric: one color per part or, with several image sets, one chart per part."""
    scores = [score for score in system.scores if score.metric == metric]
    sets = [images for images in IMAGE_SETS if any(score.images == images for score in scores)]
    parts = list(dict.fromkeys(score.part for score in scores))
    by_set = len(sets) > 1
    for chart in parts if by_set else [None]:
        bars: dict[str, dict[str, float]] = {}
        charted = [s for s in scores if (not by_set or s.part == chart) and s.family == scores[0].family]
        # Metrics with tables by group are not measured in all of them.
        groups = {s.group for s in charted} if spec.get("by_group") else set(system.groups)
        for key in sets if by_set else parts:
            some = [s for s in charted if (s.images == key if by_set else s.part == key)]
            if {s.group for s in some} != groups:
                continue
            label = images_label(system.data, some[0]) if by_set else part_label(system.data, some[0])
            times = 100 if spec["unit"] == "%" else 1
            bars[label] = {s.group: times * s.value for s in some}
        if not bars:
            continue
        part = part_label(system.data, next(s for s in scores if s.part == chart)) if chart is not None else ""
        title = ", ".join(word for word in (spec["section"] or spec["label"], part) if word)
        better = "lower is better" if spec["lower_is_better"] else "higher is better"
        name = "-".join(word for word in (metric.replace("_", "-"), chart) if word)
        unit = f", {spec['unit']}" if spec["unit"] else ""
        figure = partial(bar_figure, bars, title=title, score=f"{spec['label']}{unit}, {better}")
        yield Image(f"{name}.png", figure(), title, partial(figure, form="pdf"))


def read_sheet(path: Path, *, taken: Sequence[str] = ()) -> Image:
    """Reads a PNG file of samples; it gets a number if its name is taken.

    Raises:
        ResultError: The file is missing or is not a PNG file.
    """
    try:
        png = path.read_bytes()
        with PILImage.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.load()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ResultError(f"{path} cannot be read as a PNG file: {error}") from None
    name, number = path.name, 1
    while name in taken:
        number += 1
        name = f"{path.stem}-{number}.png"
    return Image(name, png, f"Samples: {path.stem}")
