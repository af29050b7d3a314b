"""Tables and figures of scores over blur radii and numbers of candidates, with published scores of the same family."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from dalle_zoo.results import Result, Score, value_text
from dalle_zoo_eval.comparison import Measured
from dalle_zoo_eval.documents import Block, Heading, Image, Paragraph, Table
from dalle_zoo_eval.plots import Line, line_figure
from dalle_zoo_eval.published import SCORE_FAMILIES, PublishedRow, PublishedTable

MARK = "†"
"""Marks a score that is not comparable with published ones."""
DEFICIENT = "‡"
"""Marks a distance of too few samples for a full-rank covariance."""
NOISE = 1e-6
"""Scores of at most this size are rounding, as for identical sets; their curve is not plotted."""
BLUR, CANDIDATES = "blur radius", "candidates"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table and a line of a figure: one system's scores of one metric along one axis."""

    system: str
    setting: str
    references: str
    candidates: int | None
    """Images generated per caption; None if not stated, or if it is the axis."""
    cells: dict[int, str]
    """Text of each cell by place on the axis."""
    line: Line
    samples: str
    source: str
    quoted: bool = False
    """Whether a published row repeats a score of another source."""


def sweep_blocks(
    results: Sequence[Measured], tables: Sequence[PublishedTable], metric: str, family: str
) -> Iterator[Block]:
    """Yields tables and figures of one metric and family: by blur radius, and by number of candidates."""
    deduplicated = bool(results[0].rule("captions.exclusions"))
    published = [row for table in tables for row in table.comparable_rows(metric, family, deduplicated=deduplicated)]
    spec = next(r for r in results if metric in r.data["metrics"]).data["metrics"][metric]
    label, better = spec["label"], "lower is better" if spec["lower_is_better"] else "higher is better"
    yield Heading(2, f"{label}, {family}")
    scores = [s for result in results for s in result.scores if (s.metric, s.family) == (metric, family)]
    yield Paragraph(
        f"{family}: {SCORE_FAMILIES.get(family, 'a network of that name')}. For {label}, {better}.{legend(scores)}"
    )
    by_axis = {
        BLUR: _blur_rows(results, tables, metric, family, published, lower_is_better=spec["lower_is_better"]),
        CANDIDATES: _candidate_rows(results, tables, metric, family, published),
    }
    for axis, rows in by_axis.items():
        if not rows:
            continue
        single = {place for row in rows for place in row.cells} == {0}
        if not single:
            yield Heading(3, f"{label} by {axis}")
        yield _table(rows, axis, label)
        yield from footnote([f"{row.system}: {row.samples}" for row in rows if not row.line.comparable])
        yield from deficient_note(scores)
        lines = [row.line for row in rows if row.line.measured or (len(row.line.points) > 1 and not row.quoted)]
        largest = max(abs(value) for line in lines for value in line.points.values())
        if largest > NOISE and max(len(line.points) for line in lines) > 1:
            figure = partial(
                line_figure,
                lines,
                title=f"{label} ({family}) by {axis}",
                score=f"{label}, {better}",
                axis="candidates per caption" if axis == CANDIDATES else "blur radius, pixels",
                logarithmic=axis == CANDIDATES,
            )
            name = f"{metric}-{axis.split()[0]}-{re.sub(r'[^A-Za-z0-9-]+', '-', family)}.png"
            yield Image(name, figure(), f"{label} of {family} by {axis}", partial(figure, form="pdf"))


def legend(scores: Sequence[Score]) -> str:
    """Explains the lines below a measured value, as far as they occur."""
    signs = {
        "in brackets its 95 % bootstrap interval": any(s.interval is not None for s in scores),
        "n → ∞ the value extrapolated to infinitely many samples": any(s.at_infinity is not None for s in scores),
        "± the standard deviation over parts of the samples": any(
            s.std is not None and s.interval is None for s in scores
        ),
    }
    found = [text for text, occurs in signs.items() if occurs]
    return f" Below a measured value: {'; '.join(found)}." if found else ""


def deficient_note(scores: Sequence[Score]) -> Iterator[Block]:
    """Explains the mark of distances with too few samples, if there are any."""
    if any(score.rank_deficient for score in scores):
        yield Paragraph(
            f"{DEFICIENT} no more samples than features: the covariance is rank-deficient and the distance far too "
            "high. It is comparable only with distances of as many samples."
        )


def footnote(marked: Sequence[str]) -> Iterator[Block]:
    """Explains the mark of scores that are not comparable.

    Args:
        marked: Reason of each.
    """
    if marked:
        yield Paragraph(
            f"{MARK} not comparable with scores of other systems, because scores depend on the number of samples. "
            f"{'. '.join(marked)}."
        )


def _blur_rows(
    results: Sequence[Measured],
    tables: Sequence[PublishedTable],
    metric: str,
    family: str,
    published: Sequence[PublishedRow],
    *,
    lower_is_better: bool,
) -> list[Row]:
    """Returns measured rows, then published ones from best to worst, at the radii that were measured."""
    rows = []
    for result in results:
        scores = [score for score in result.scores if (score.metric, score.family) == (metric, family)]
        counts = {score.candidates for score in scores}
        if not counts:
            continue  # this result does not have the score
        # Figure 9(c) is plotted without blur, so only the protocol's number of candidates has other radii.
        retained = {n for n in counts if any(s.blur for s in scores if s.candidates == n)} or {max(counts, key=_or_0)}
        for count in sorted(retained, key=_or_0):
            own = {score.blur: score for score in scores if score.candidates == count}
            rows.append(_measured(result, tables, count, own))
    radii = {radius for row in rows for radius in row.cells}
    others: dict[object, dict[int, PublishedRow]] = {}
    curves = _curves(published)
    for entry in published:
        if entry.blur in radii and (entry.system, entry.source) not in curves:
            others.setdefault(entry.series, {})[entry.blur] = entry
    best = sorted(others.values(), key=lambda s: (min(s), s[min(s)].value), reverse=not lower_is_better)
    return rows + [_published(series) for series in best]


def _candidate_rows(
    results: Sequence[Measured],
    tables: Sequence[PublishedTable],
    metric: str,
    family: str,
    published: Sequence[PublishedRow],
) -> list[Row]:
    """Returns rows of figure 9(c): evaluated models, and published systems with several numbers of candidates."""
    rows = []
    for result in results:
        own = {
            s.candidates: s
            for s in result.scores
            if (s.metric, s.family, s.blur) == (metric, family, 0) and s.candidates is not None
        }
        if own and result.at("source.kind") != "images":
            rows.append(_measured(result, tables, None, own))
    curves = _curves(published)
    published_rows = []
    for system, source in curves:
        series = {r.candidates: r for r in published if (r.system, r.source) == (system, source) and r.candidates}
        published_rows.append(_published(series, over_candidates=True))
    # One number of candidates with nothing to compare adds nothing to the table by blur radius.
    return rows + published_rows if rows and (published_rows or max(len(row.cells) for row in rows) > 1) else []


def _curves(published: Sequence[PublishedRow]) -> list[tuple[str, str]]:
    """Returns systems and sources with scores for many numbers of candidates."""
    found = Counter((row.system, row.source) for row in {r.series: r for r in published if r.blur == 0}.values())
    return [pair for pair, count in found.items() if count > 2]


def _measured(
    result: Measured, tables: Sequence[PublishedTable], candidates: int | None, scores: dict[int, Score]
) -> Row:
    samples, comparable = samples_text(result, tables, list(scores.values()))
    if result.at("source.kind") == "images":
        candidates = None
    system = result.name
    legend = system if candidates in (None, 1) else f"{system}, best of {candidates}"
    if any(score.rank_deficient for score in scores.values()):
        legend += f" {DEFICIENT}"
    return Row(
        system=system,
        setting="measured",
        references="without overlaps" if result.rule("captions.exclusions") else "original",
        candidates=candidates,
        cells={place: measured_cell(result.data, score, comparable=comparable) for place, score in scores.items()},
        line=Line(
            label=legend if comparable else f"{legend} ({samples.partition(', against')[0]}: not comparable)",
            points={place: score.value for place, score in scores.items()},
            intervals={place: i for place, s in scores.items() if (i := _interval(s))},
            measured=True,
            comparable=comparable,
        ),
        samples=samples,
        source="this report",
    )


def _published(series: dict[int, PublishedRow], *, over_candidates: bool = False) -> Row:
    """Returns a published row, over blur radii or numbers of candidates."""
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
    return Table(
        [*fixed, *columns, "samples", "source"], body, strong, on_screen=frozenset({"references", "samples", "source"})
    )


def _column(axis: str, place: int) -> str:
    return f"N = {place}" if axis == CANDIDATES else f"radius {place}"


def samples_text(result: Measured, tables: Sequence[PublishedTable], scores: Sequence[Score]) -> tuple[str, bool]:
    """Returns the numbers of samples and references as text, and whether they make scores comparable."""
    expected = expected_samples(result, tables)
    found = sorted({score.samples for score in scores})
    text = " and ".join(f"{count:,}" for count in found)
    # Next to published scores, a number of samples that nothing confirms does not count as the right one.
    comparable = found == [expected] if expected is not None else not tables
    if not comparable:
        text += f" samples instead of {expected:,}" if expected is not None else " samples, their right number unknown"
    references = sorted({s.reference_samples for s in scores if s.reference_samples is not None})
    if references:
        text += f", against {' and '.join(f'{count:,}' for count in references)}"
    return text, comparable


def measured_cell(result: Result, score: Score, *, comparable: bool = True) -> str:
    """Returns the value and, below it, interval or deviation and value at infinity."""
    marks = [MARK] * (not comparable) + [DEFICIENT] * score.rank_deficient
    text = partial(value_text, result, score)
    lines = [" ".join([text(score.value), *marks])]
    if score.interval is not None:
        lines.append(f"[{text(score.interval[0])}, {text(score.interval[1])}]")
    elif score.std is not None:
        lines.append(f"± {text(score.std)}")
    if score.at_infinity is not None:
        lines.append(f"n → ∞ {text(score.at_infinity)}")
    return "\n".join(lines)


def _published_cell(row: PublishedRow) -> str:
    deviation = f" ± {row.std:g}" if row.std is not None else ""
    return f"{'~' if row.approximate else ''}{row.value:g}{deviation}"


def _interval(score: Score) -> tuple[float, float] | None:
    if score.interval is not None:
        return score.interval[0], score.interval[1]
    return (score.value - score.std, score.value + score.std) if score.std is not None else None


def expected_samples(result: Measured, tables: Sequence[PublishedTable]) -> int | None:
    """Returns the number of samples of comparable scores: that of the published tables, else that of the protocol.

    Returns:
        The number; None if neither states one.
    """
    stated = [table.samples for table in tables if table.samples is not None]
    options = (*stated, result.of_group("expected_captions"))
    return next((int(count) for count in options if count), None)


def _or_0(count: int | None) -> int:
    return count or 0
