"""The results of a check as a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARKS = {None: "", True: "yes", False: "**no**"}


def render(result: Mapping[str, Any]) -> str:
    """Renders the Markdown of a result, complete or not."""
    stages: Mapping[str, Any] = result["stages"]
    found = [finding for stage in stages.values() for finding in stage.get("findings", ())]
    wanted = [finding for finding in found if finding["passed"] is not None]
    errors = [error for stage in stages.values() for error in stage.get("errors", ())]
    build = f"torch {result['torch']}, CUDA {result['cuda']}, dalle-zoo {result['dalle_zoo']}"
    lines = [
        "# GPU check",
        "",
        f"`{result['command']}`, {result['date']}, {result['seconds']:.0f} s, {build}.",
        "",
    ]
    if result["tiny"]:
        lines += ["This is a rehearsal with tiny shapes: its times say nothing.", ""]
    lines += [
        f"{sum(f['passed'] for f in wanted)} of {len(wanted)} figures are as wanted, {len(errors)} errors.",
        "",
        "| stage | state | seconds |",
        "|---|---|---|",
        *(f"| {name} | {stage['status']} | {stage.get('seconds', 0):.0f} |" for name, stage in stages.items()),
        "",
    ]
    for name, stage in stages.items():
        if stage.get("findings") or stage.get("errors"):
            lines += [f"## {name}", "", f"{stage['about']}.", "", *_table(stage["findings"])]
            lines += [f"- {_cell(error['error'])}" for error in stage["errors"]] + [""] * bool(stage["errors"])
    return "\n".join(lines)


def _table(findings: list[Mapping[str, Any]]) -> list[str]:
    if not findings:
        return []
    rows = [
        f"| {_cell(f['name'])} | {f['value']:,.4g} {f['unit']} | {f['wanted']} | {MARKS[f['passed']]} |"
        for f in findings
    ]
    return ["| figure | value | wanted | reached |", "|---|---|---|---|", *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
