"""Renders the tables and plots of docs/design/speed.md from the stored results.

    python benchmarks/report.py            after `make bench`, which calls it

Each table is between ``<!-- NAME -->`` and ``<!-- end -->``; NAME is a benchmark, "all" for the overview, or "peers"
for the comparison with other packages (`make bench-peers`). Text outside of these lines is written by hand and
contains no measured numbers.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.peers import table as peers  # noqa: E402 (a checkout runs without installing)
from dalle_zoo.files import atomic_write, read_json  # noqa: E402

RESULTS = ROOT / "benchmarks/results/speed"
PAGE = ROOT / "docs/design/speed.md"

Result = dict[str, Any]


def read_results() -> list[Result]:
    """All stored results, in the order of their names."""
    found = {path.stem: read_json(path) for path in sorted(RESULTS.glob("*.json"))}
    return [{**result, "file": stem} for stem, result in found.items()]


def milliseconds(row: dict[str, Any], path: str) -> str:
    """Median time of a path, or its memory."""
    if row.get("unit") == "bytes":
        return f"{statistics.median(row['seconds'][path]) / 1e6:,.4g} MB"
    return f"{1000 * statistics.median(row['seconds'][path]):,.4g}"


def equality(row: dict[str, Any]) -> str:
    """Differences of the outputs that were checked."""
    return "; ".join(f"{check['what']} {check['value']:.3g}" for check in row["equal"]) or "–"


def ratio(row: dict[str, Any]) -> str:
    """The ratio, in bold if it is below its target."""
    text = f"{row['ratio']:.2f}"
    short = row["target"] is not None and row["ratio"] < row["target"]
    return f"**{text}**" if short else text


def table(results: list[Result]) -> str:
    """Renders the table of one or more results."""
    lines = [
        "| what | against | precision | where | ratio | target | ms | ms against | checked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for result in results:
        threads = result["threads"]
        where = result["device"] if "cuda" in result["command"] else f"{threads} thread{'s' * (threads > 1)}"
        for row in result["rows"]:
            target = "–" if row["target"] is None else f"{row['target']:g}"
            mark = ""
            if row["note"]:
                if row["note"] not in notes:
                    notes.append(row["note"])
                mark = f" [{notes.index(row['note']) + 1}]"
            cells = [
                row["name"] + mark, row["against"], row["dtype"], where, ratio(row), target,
                milliseconds(row, row["path"]), milliseconds(row, row["against"]), equality(row),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    footnotes = [f"[{number}] {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "".join(f"\n\n{line}" for line in footnotes)


def made_by(results: list[Result]) -> str:
    """Renders commands, machine and date."""
    lines = []
    for r in results:
        load = f" at a load of {r['load']:.1f}" if "load" in r else ""
        lines.append(
            f"`{r['command']}`: {r['device']}, {r['cores']} cores{load}, {r['clock']}, "
            f"torch {r['torch']}, {r['date']}."
        )
    return "  \n".join(lines)


def render(page: str, results: list[Result]) -> str:
    """Returns the page with all tables rendered again."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        chosen = [r for r in results if name == r["benchmark"]]
        if name == "all":
            parts = [overview(results)]
        elif name == "peers":
            parts = peers.render(peers.read_results())
        elif chosen:
            tables = [table(chosen)] if any(result["rows"] for result in chosen) else []
            parts = [*tables, *images(chosen), made_by(chosen)]
        else:
            parts = [f"Not measured yet: `make bench BENCH={name}`."]
        return "\n\n".join([f"<!-- {name} -->", *parts, "<!-- end -->"])

    return re.sub(r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def images(results: list[Result]) -> list[str]:
    """Links to the plots of a benchmark, each from the first result that has it."""
    shown = {title: series_path(result, title) for result in reversed(results) for title in result["series"]}
    return [
        f"![{title}]({Path(os.path.relpath(path, PAGE.parent)).as_posix()})" for title, path in sorted(shown.items())
    ]


def series_path(result: Result, title: str) -> Path:
    """Returns the path of the plot of a series."""
    slug = re.sub(r"\W+", "_", title).strip("_").lower()
    return RESULTS / f"{result['file']}_{slug}.png"


def overview(results: list[Result]) -> str:
    """Renders the ratios of all rows that have a target."""
    lines = ["| what | against | precision | where | ratio | target |", "|---|---|---|---|---|---|"]
    for result in results:
        threads = result["threads"]
        where = result["device"] if "cuda" in result["command"] else f"{threads} thread{'s' * (threads > 1)}"
        for row in result["rows"]:
            if row["target"] is not None:
                cells = [row["name"], row["against"], row["dtype"], where, ratio(row), f"{row['target']:g}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[Result]) -> list[Path]:
    """Plots the ratios with their targets, and every stored series, as PNG files."""
    from matplotlib.figure import Figure

    rows = [row for r in results for row in r["rows"] if row["target"] is not None and row["threads"] != 2]
    figure = Figure(figsize=(10, 0.5 * len(rows) + 1), layout="constrained")
    axis = figure.subplots()
    positions = range(len(rows))
    labels = [textwrap.fill(f"{row['name']}, {row['dtype']}, against {row['against']}", 66) for row in rows]
    colors = ["tab:green" if row["ratio"] >= row["target"] else "tab:red" for row in rows]
    axis.barh(positions, [row["ratio"] for row in rows], color=colors)
    axis.scatter([row["target"] for row in rows], positions, color="black", marker="|", s=200, label="target")
    axis.set_yticks(positions, labels, fontsize="small")
    axis.set_xscale("log")
    axis.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
    axis.set_xlabel("speedup over the compared path; one thread")
    axis.invert_yaxis()
    axis.legend()
    made = [save(figure, RESULTS / "ratios.png")]
    for result in results:
        for name, series in result["series"].items():
            figure = Figure(figsize=(6, 3.6), layout="constrained")
            axis = figure.subplots()
            for label, points in series["lines"].items():
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
            axis.set(title=name, xlabel=series["x"], ylabel=series["y"])
            if series.get("logarithmic"):
                axis.loglog(base=2)
                axis.yaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_major_formatter("{x:g}")
            else:
                axis.set_ylim(bottom=0)
            axis.legend(fontsize="small")
            made.append(save(figure, series_path(result, name)))
    return made


def save(figure: Any, path: Path) -> Path:
    """Saves a figure atomically."""
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", dpi=110)
    return path


def main() -> None:
    """Writes the page and the plots."""
    results = read_results()
    with atomic_write(PAGE) as aside:
        aside.write_text(render(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for path in [PAGE, *plot(results)]:
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
