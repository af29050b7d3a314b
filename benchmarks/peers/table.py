"""Renders the comparison with other packages from ``benchmarks/results/peers/``; `benchmarks/report.py` calls it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from dalle_zoo.files import read_json

RESULTS = Path(__file__).parents[1] / "results" / "peers"
TABLES = ("S", "M", "dvae")
"""What `make bench-peers` measures."""
OURS, OWN_PROMPTS, FLOOR = "dalle-zoo", "dalle-zoo, own prompts", "floor"

Result = dict[str, Any]


def read_results() -> list[Result]:
    """All stored comparisons: S, M, then the dVAE."""
    found = [read_json(path) for path in RESULTS.glob("*.json")]
    return sorted(found, key=lambda result: (result["shape"] == "dvae", -len(result["rows"])))


def rates(row: dict[str, Any]) -> dict[str, float]:
    """Median rate of each system."""
    return {name: row["amount"] / statistics.median(seconds) for name, seconds in row["seconds"].items()}


def both_prompts(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row, and for a batch a second one in which each image has its own prompt: the others compute both alike."""
    seconds = dict(row["seconds"])
    own = seconds.pop(OWN_PROMPTS, None)
    rows = [{**row, "seconds": seconds}]
    if own is not None:
        name = row["name"].replace("of one prompt", "of 16 prompts")
        rows.append({**row, "name": name, "seconds": {**seconds, OURS: own}})
    return rows


def line(row: dict[str, Any], systems: list[str], notes: list[str]) -> str:
    """One line of the table; the fastest system, apart from the floor, is in bold."""
    found = rates(row)
    fastest = max((rate for name, rate in found.items() if name != FLOOR), default=None)
    others = [rate for name, rate in found.items() if name not in (OURS, FLOOR)]
    cells = [f"{row['name']}, {row['unit']}", row["dtype"]]
    for name in systems:
        if name in row["errors"]:
            notes.append(f"{name}: {row['errors'][name]}")
            cells.append(f"failed [{len(notes)}]")
        elif name not in found:
            cells.append("–")
        else:
            text = f"{found[name]:.3g}"
            cells.append(f"**{text}**" if found[name] == fastest and name != FLOOR else text)
    cells.append(f"{found[OURS] / max(others):.2f}" if others and OURS in found else "–")
    return f"| {' | '.join(cells)} |"


def table(result: Result) -> str:
    """Renders the table of one shape, with its notes and its command."""
    rows = [row for stored in result["rows"] for row in both_prompts(stored)]
    named = {name: None for row in rows for name in (*row["seconds"], *row["errors"])}
    systems = [FLOOR, OURS, *(name for name in named if name not in (FLOOR, OURS))]
    head = ["", "precision", *systems, "dalle-zoo over the fastest other"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    facts, notes = result["systems"], []
    if facts:
        counts = (f"{facts[name]['parameters'] / 1e6:.1f}" if name in facts else "–" for name in systems)
        lines.append(f"| parameters, millions | | {' | '.join(counts)} | |")
    lines += [line(row, systems, notes) for row in rows]
    checks = [f"{row['name']}: {row['checked']}" for row in result["rows"] if "checked" in row]
    if facts:
        apart = max(fact["difference"] for fact in facts.values())
        versions = ", ".join(fact["package"] for fact in facts.values())
        checks.append(f"{versions}; cached logits differ from complete ones by at most {apart:.1g}")
    made = (
        f"`{result['command']}`: {result['device']}, {result['cores']} cores at a load of {result['load']:.1f}, "
        f"1 thread, CPU seconds, torch {result['torch']}, {result['date']}."
    )
    parts = [f"**{result['title']}**", "\n".join(lines), *(f"[{n}] {note}" for n, note in enumerate(notes, 1))]
    return "\n\n".join([*parts, "  \n".join([*(f"Checked: {check}." for check in checks), made])])


def render(results: list[Result]) -> list[str]:
    """Renders all tables, what has none yet, and the list of repairs."""
    measured = {result["shape"] for result in results}
    missing = " ".join(name for name in TABLES if name not in measured)
    parts = [table(result) for result in results]
    if missing:
        parts.append(f'Not measured yet: `make bench-peers BENCH="--shapes {missing}"`.')
    if results:
        repairs = results[0]["repairs"].items()
        parts += ["Repaired at run time:", "\n".join(f"- {name}: {'; '.join(texts)}." for name, texts in repairs)]
    return parts
