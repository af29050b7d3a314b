"""Reports: measured scores beside published ones of the same family, as Markdown, HTML and figures.

Everything is taken from result files and from the tables of published scores; nothing is measured here.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dalle_zoo_eval.documents import (
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    field_table,
    field_text,
    to_markdown,
    write_document,
)
from dalle_zoo_eval.plots import Line, line_figure
from dalle_zoo_eval.published import FAMILIES, PublishedRow, PublishedTable, find_published
from dalle_zoo_eval.results import FRECHET, Result, ResultError, Score, read_results

LABELS = {
    "fid": "FID",
    FRECHET: "Fréchet distance",
    "is": "Inception score",
    "kid": "KID",
    "precision": "Precision",
    "recall": "Recall",
    "clip_score": "CLIP score",
    "r_precision": "R-precision",
}
"""Metrics in the order of a report, as people call them."""
LOWER_IS_BETTER = ("fid", FRECHET, "kid")
DRAWN = ("fid", FRECHET, "is")
"""Metrics that have tables of their own, with published rows and figures."""
SAMPLES, COPIES = SHEETS = ("samples.png", "memorization.png")
"""Sheets that an evaluation puts beside its result: what was judged, and the nearest training images."""
MARK = "†"
"""Stands behind a score that does not compare with published ones."""
DEFICIENT = "‡"
"""Stands behind a distance of too few samples for a covariance."""
BLUR, CANDIDATES = "blur radius", "candidates"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table and a line of a figure: one system's scores of one metric along one axis."""

    system: str
    setting: str
    references: str
    candidates: int | None
    """Images generated of a caption; None where it is not stated, or where it is the axis."""
    cells: dict[int, str]
    """Text by place on the axis."""
    line: Line
    samples: str
    source: str
    deficient: bool = False
    """Whether a score rests on too few samples for a covariance."""
    quoted: bool = False
    """Whether a published row repeats another's score."""


def write_report(results: Sequence[Path], out: Path, *, sheets: Sequence[Path] = ()) -> list[Path]:
    """Writes ``report.md``, ``report.html`` and the figures of both.

    Nothing is written unless all result files can be used and belong together.

    Args:
        results: Result files of ``dalle-zoo eval`` with the same protocol and benchmark.
        out: Folder; made if it is missing, files of these names are replaced.
        sheets: PNG files of samples to show; those that lie elsewhere are copied to ``samples-1.png`` and so on.

    Returns:
        The files that were written, the two reports first.

    Raises:
        ResultError: A result file or a sheet cannot be used, or the results do not belong together.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ResultError(f"out must be a folder, got the file {out}")
    images = [read_sheet(Path(path), out, number) for number, path in enumerate(sheets, 1)]
    blocks = report_blocks(read_results(results), images)
    return write_document(blocks, out)


def summary(results: Sequence[Path]) -> str:
    """The tables alone, as Markdown: measured rows beside published ones, for the screen."""
    blocks = _score_blocks(read_results(results))
    return to_markdown([block for block in blocks if not isinstance(block, Figure)])


def report_blocks(results: Sequence[Result], sheets: Sequence[Figure] = ()) -> list[Block]:
    """The report as a document.

    Args:
        results: Results that belong together.
        sheets: Images of samples.
    """
    first = results[0]
    blocks: list[Block] = [
        Heading(1, str(first.protocol.get("title") or first.protocol["name"])),
        Paragraph(
            f"Protocol {first.protocol['name']}. Measured rows stand out; a published row stands beside them only "
            "where metric and family are the same: two families score the same images several points apart."
        ),
    ]
    blocks += _score_blocks(results)
    if sheets:
        blocks += [Heading(2, "Samples"), *sheets]
    return [*blocks, *_provenance(results)]


# ---------------------------------------------------------------- scores


def _score_blocks(results: Sequence[Result]) -> list[Block]:
    tables = [find_published(name) for name in results[0].protocol.get("published") or ()]
    groups = dict.fromkeys((s.metric, s.family) for result in results for s in result.scores if s.metric in DRAWN)
    blocks: list[Block] = []
    for metric, family in sorted(groups, key=lambda group: (DRAWN.index(group[0]), group[1])):
        blocks += _group_blocks(results, tables, metric, family)
    return [*blocks, *_other_scores(results, tables)]


def _group_blocks(
    results: Sequence[Result], tables: Sequence[PublishedTable], metric: str, family: str
) -> Iterator[Block]:
    """Tables and figures of one metric and one family: by blur radius, and by number of candidates."""
    deduplicated = bool(results[0].at("protocol.captions.exclusions"))
    published = [row for table in tables for row in table.beside(metric, family, deduplicated=deduplicated)]
    label = LABELS[metric]
    better = _better(metric)
    yield Heading(2, f"{label}, {family}")
    scores = [s for result in results for s in result.scores if (s.metric, s.family) == (metric, family)]
    yield Paragraph(
        f"{family}: {FAMILIES.get(family, 'a network of that name')}. For {label}, {better}.{_legend(scores)}"
    )
    by_axis = {
        BLUR: _blur_rows(results, tables, metric, family, published),
        CANDIDATES: _candidate_rows(results, tables, metric, family, published),
    }
    for axis, rows in by_axis.items():
        if not rows:
            continue
        yield Heading(3, f"{label} by {axis}")
        yield _table(rows, axis, label)
        yield from _footnote([f"{row.system}: {row.samples}" for row in rows if not row.line.comparable])
        if any(row.deficient for row in rows):
            yield Paragraph(
                f"{DEFICIENT} no more samples than features, so the covariance lacks rank and the distance is far too "
                "high: it compares with distances of as many samples alone."
            )
        lines = [row.line for row in rows if row.line.measured or (len(row.line.points) > 1 and not row.quoted)]
        if max(len(line.points) for line in lines) > 1:
            png = line_figure(
                lines,
                title=f"{label} ({family}) by {axis}",
                score=f"{label}, {better}",
                axis="candidates of a caption" if axis == CANDIDATES else "blur radius, pixels",
                logarithmic=axis == CANDIDATES,
            )
            name = f"{metric}-{axis.split()[0]}-{re.sub(r'[^A-Za-z0-9-]+', '-', family)}.png"
            yield Figure(name, png, f"{label} of {family} by {axis}")


def _legend(scores: Sequence[Score]) -> str:
    """What stands below a measured value, in words, as far as it occurs."""
    signs = {
        "in brackets its 95 % bootstrap interval": any(s.interval is not None for s in scores),
        "n → ∞ the value extrapolated to infinitely many samples": any(s.at_infinity is not None for s in scores),
        "± the standard deviation over parts of the samples": any(
            s.std is not None and s.interval is None for s in scores
        ),
    }
    found = [text for text, occurs in signs.items() if occurs]
    return f" Below a measured value: {'; '.join(found)}." if found else ""


def _other_scores(results: Sequence[Result], tables: Sequence[PublishedTable]) -> Iterator[Block]:
    """One table of the metrics for which no published score is comparable."""
    rows: list[list[str]] = []
    marked: dict[str, None] = {}
    for metric in (name for name in LABELS if name not in DRAWN):
        for result, system in zip(results, _names(results), strict=True):
            for score in (s for s in result.scores if s.metric == metric):
                samples, comparable = _samples(result, tables, [score])
                if not comparable:
                    marked[f"{system}: {samples}"] = None
                count = str(score.candidates or "–")
                cell = _measured_cell(score, comparable)
                rows.append([system, LABELS[metric], score.family, count, str(score.blur), cell, samples])
    if rows:
        yield Heading(2, "Other scores")
        measured = [s for result in results for s in result.scores if s.metric not in DRAWN]
        yield Paragraph(
            f"KID: lower is better; the others: higher is better. No published score is comparable.{_legend(measured)}"
        )
        yield Table(["system", "metric", "network", "candidates", "blur radius", "score", "samples"], rows)
        yield from _footnote(list(marked))


def _footnote(marked: Sequence[str]) -> Iterator[Block]:
    if marked:
        yield Paragraph(
            f"{MARK} not comparable with scores of other systems, because the number of samples moves a score. "
            f"{'. '.join(marked)}."
        )


def _better(metric: str) -> str:
    return "lower is better" if metric in LOWER_IS_BETTER else "higher is better"


def _blur_rows(
    results: Sequence[Result],
    tables: Sequence[PublishedTable],
    metric: str,
    family: str,
    published: Sequence[PublishedRow],
) -> list[Row]:
    """Measured rows, then published ones from the best to the worst, at the radii that were measured."""
    rows = []
    for result, system in zip(results, _names(results), strict=True):
        scores = [score for score in result.scores if (score.metric, score.family) == (metric, family)]
        counts = {score.candidates for score in scores}
        if not counts:
            continue  # a score that this subject does not have
        # Figure 9(c) is sampled without blur, so only the number that the protocol asks for has other radii.
        retained = {n for n in counts if any(s.blur for s in scores if s.candidates == n)} or {max(counts, key=_or_0)}
        for count in sorted(retained, key=_or_0):
            own = {score.blur: score for score in scores if score.candidates == count}
            rows.append(_measured(result, tables, system, count, own))
    radii = {radius for row in rows for radius in row.cells}
    others: dict[object, dict[int, PublishedRow]] = {}
    curves = _curves(published)
    for entry in published:
        if entry.blur in radii and (entry.system, entry.source) not in curves:
            others.setdefault(entry.series, {})[entry.blur] = entry
    best = sorted(others.values(), key=lambda s: (min(s), s[min(s)].value), reverse=metric not in LOWER_IS_BETTER)
    return rows + [_published(series) for series in best]


def _candidate_rows(
    results: Sequence[Result],
    tables: Sequence[PublishedTable],
    metric: str,
    family: str,
    published: Sequence[PublishedRow],
) -> list[Row]:
    """Rows of figure 9(c): systems that sample, and published systems with several numbers of candidates."""
    rows = []
    for result, system in zip(results, _names(results), strict=True):
        own = {
            s.candidates: s
            for s in result.scores
            if (s.metric, s.family, s.blur) == (metric, family, 0) and s.candidates is not None
        }
        if own and result.at("subject.kind") != "images":
            rows.append(_measured(result, tables, system, None, own))
    curves = _curves(published)
    published_rows = []
    for system, source in curves:
        series = {r.candidates: r for r in published if (r.system, r.source) == (system, source) and r.candidates}
        published_rows.append(_published(series, over_candidates=True))
    # One number of candidates and nothing to hold it against says no more than the table by blur radius.
    return rows + published_rows if rows and (published_rows or max(len(row.cells) for row in rows) > 1) else []


def _curves(published: Sequence[PublishedRow]) -> list[tuple[str, str]]:
    """Systems and sources that give scores for many numbers of candidates."""
    found = Counter((row.system, row.source) for row in {r.series: r for r in published if r.blur == 0}.values())
    return [pair for pair, count in found.items() if count > 2]


def _measured(
    result: Result, tables: Sequence[PublishedTable], system: str, candidates: int | None, scores: dict[int, Score]
) -> Row:
    samples, comparable = _samples(result, tables, list(scores.values()))
    if result.at("subject.kind") == "images":
        candidates = None
    legend = system if candidates in (None, 1) else f"{system}, best of {candidates}"
    deficient = any(score.rank_deficient for score in scores.values())
    if deficient:
        legend += f" {DEFICIENT}"
    return Row(
        system=system,
        setting="measured",
        references="without overlaps" if result.at("protocol.captions.exclusions") else "original",
        candidates=candidates,
        cells={place: _measured_cell(score, comparable) for place, score in scores.items()},
        line=Line(
            label=legend if comparable else f"{legend} ({samples.partition(', against')[0]}: not comparable)",
            points={place: score.value for place, score in scores.items()},
            intervals={place: i for place, s in scores.items() if (i := _interval(s))},
            measured=True,
            comparable=comparable,
        ),
        samples=samples,
        deficient=deficient,
        source="this report",
    )


def _published(series: dict[int, PublishedRow], *, over_candidates: bool = False) -> Row:
    """A published row, over blur radii or numbers of candidates."""
    first = series[min(series)]
    candidates = None if over_candidates else first.candidates
    legend = first.system if candidates in (None, 1) else f"{first.system}, best of {candidates}"
    error = f", ± {first.error:g}" if first.error is not None else ""
    return Row(
        system=first.system,
        setting="; ".join(text for text in (first.setting, first.note) if text),
        references={None: "not stated", "original": "original", "deduplicated": "without overlaps"}[first.overlap],
        candidates=candidates,
        cells={place: _published_cell(row) for place, row in series.items()},
        line=Line(label=legend, points={place: row.value for place, row in series.items()}, measured=False),
        samples="–",
        quoted=first.quoted,
        source=f"{first.source}{error} [{first.marks}]",
    )


def _table(rows: Sequence[Row], axis: str, label: str) -> Table:
    places = sorted({place for row in rows for place in row.cells})
    columns = [label] if axis == BLUR and places == [0] else [_column(axis, place) for place in places]
    fixed = ["system", "setting", "references"] + (["candidates"] if axis == BLUR else [])
    body = []
    for row in rows:
        count = [str(row.candidates or "–")] if axis == BLUR else []
        cells = [row.cells.get(place, "–") for place in places]
        body.append([row.system, row.setting, row.references, *count, *cells, row.samples, row.source])
    strong = frozenset(n for n, row in enumerate(rows) if row.line.measured)
    return Table([*fixed, *columns, "samples", "source"], body, strong)


def _column(axis: str, place: int) -> str:
    return f"N = {place}" if axis == CANDIDATES else f"radius {place}"


def _samples(result: Result, tables: Sequence[PublishedTable], scores: Sequence[Score]) -> tuple[str, bool]:
    """The numbers of samples and references in words, and whether they are those that comparable scores rest on."""
    expected = expected_samples(result, tables)
    found = sorted({score.samples for score in scores})
    text = " and ".join(f"{count:,}" for count in found)
    # Where published scores stand beside it, a number that nothing confirms is not taken for the right one.
    comparable = found == [expected] if expected is not None else not tables
    if not comparable:
        text += f" samples instead of {expected:,}" if expected is not None else " samples, their right number unknown"
    references = sorted({s.reference_samples for s in scores if s.reference_samples is not None})
    if references:
        text += f", against {' and '.join(f'{count:,}' for count in references)}"
    return text, comparable


def _measured_cell(score: Score, comparable: bool) -> str:
    """Value, and below it interval or deviation, and value at infinity."""
    shape = ".2f" if score.metric in DRAWN else ".4f"
    marks = [MARK] * (not comparable) + [DEFICIENT] * score.rank_deficient
    lines = [" ".join([f"{score.value:{shape}}", *marks])]
    if score.interval is not None:
        lines.append(f"[{score.interval[0]:{shape}}, {score.interval[1]:{shape}}]")
    elif score.std is not None:
        lines.append(f"± {score.std:{shape}}")
    if score.at_infinity is not None:
        lines.append(f"n → ∞ {score.at_infinity:{shape}}")
    return "\n".join(lines)


def _published_cell(row: PublishedRow) -> str:
    deviation = f" ± {row.std:g}" if row.std is not None else ""
    return f"{'~' if row.approximate else ''}{row.value:g}{deviation}"


def _interval(score: Score) -> tuple[float, float] | None:
    if score.interval is not None:
        return score.interval[0], score.interval[1]
    return (score.value - score.std, score.value + score.std) if score.std is not None else None


def expected_samples(result: Result, tables: Sequence[PublishedTable]) -> int | None:
    """Samples that a comparable score rests on: those of the published tables, else those of the protocol.

    Returns:
        The number; None where neither says one.
    """
    stated = [table.samples for table in tables if table.samples is not None]
    options = (*stated, result.at("protocol.captions.count"), result.at("benchmark.captions"))
    return next((int(count) for count in options if count), None)


def _names(results: Sequence[Result]) -> list[str]:
    """Subjects by name, numbered where two have the same."""
    names = [result.subject for result in results]
    return [
        f"{name} ({names[: n + 1].count(name)})" if names.count(name) > 1 else name for n, name in enumerate(names)
    ]


def _or_0(count: int | None) -> int:
    return count or 0


# ---------------------------------------------------------------- what was done


def _provenance(results: Sequence[Result]) -> Iterator[Block]:
    """Everything that fixes the numbers: subjects, benchmark, networks, self-checks, protocol."""
    first = results[0]
    yield Heading(2, "What was measured")
    for result, name in zip(results, _names(results), strict=True):
        yield Heading(3, name)
        parts = {
            "subject": result.data["subject"],
            "benchmark": result.data["benchmark"],
            "memorization": {k: v for k, v in (result.at("memorization") or {}).items() if k != "closest"},
            "speed": result.at("speed"),
            "code_version": result.at("code_version"),
            "versions": result.at("versions"),
            "device": result.at("device"),
            "run": result.at("run"),
            "bootstrap": result.at("bootstrap"),
            "date": result.at("date"),
            "protocol": {key: value for key, value in result.protocol.items() if value != first.protocol.get(key)},
        }
        yield field_table(parts)
        closest = result.at("memorization.closest") or []
        if closest:
            head = ["sample", "nearest training image", "cosine"]
            yield Table(
                head, [[field_text(pair.get(k)) for k in ("sample", "training", "similarity")] for pair in closest]
            )
        checks = result.data.get("selfcheck") or []
        if checks:
            head = ["self-check", "found", "expected", "passed"]
            yield Table(head, [[field_text(check.get(key)) for key in ("name", *head[1:])] for check in checks])
        yield Bullets([f"left out: {line}" for line in result.data.get("left_out") or []])
    networks = {name: record for result in results for name, record in result.networks.items()}
    if networks:
        yield Heading(2, "Networks")
        yield field_table(networks)
    yield Heading(2, "Protocol")
    yield field_table({key: value for key, value in first.protocol.items() if key != "notes"})
    yield Bullets([str(note) for note in first.protocol.get("notes") or []])


def read_sheet(path: Path, out: Path, number: int) -> Figure:
    """A PNG file of samples; one that lies elsewhere than in ``out`` is called ``samples-NUMBER.png`` there.

    Raises:
        ResultError: It is no PNG file.
    """
    try:
        png = path.read_bytes()
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.load()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ResultError(f"{path} cannot be read as a PNG file: {error}") from None
    name = path.name if path.parent.resolve() == out.resolve() else f"samples-{number}.png"
    return Figure(name, png, f"Samples: {path.stem}")
