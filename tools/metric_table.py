"""Writes the table of metrics in docs/evaluate/protocols.md from the registry.

    python tools/metric_table.py

A test compares the document with the registry.
"""

from __future__ import annotations

import re
from pathlib import Path

from dalle_zoo_eval.metrics import METRICS, MetricSpec
from dalle_zoo_eval.opening import OTHER_INPUTS

DOCUMENT = Path(__file__).parents[1] / "docs/evaluate/protocols.md"
HEAD = "| metric | in reports | better | network | interval or deviation | samples | source |"


def table() -> str:
    """Returns the table, with a row per metric."""
    return "\n".join([HEAD, "|---" * HEAD.count(" | ") + "|---|", *(_row(METRICS.spec(name)) for name in METRICS)])


def _row(spec: MetricSpec) -> str:
    takes_any = "any" if spec.inputs - OTHER_INPUTS else "none"
    cells = [
        f"`{spec.name}`",
        spec.label or ", ".join(spec.parts.values()),
        "lower" if spec.lower_is_better else "higher",
        ", ".join(f"`{name}`" for name in spec.extractor) or takes_any,
        spec.interval or "–",
        f"{spec.least:,}" if spec.least else "–",
        spec.source or "this project",
    ]
    return f"| {' | '.join(cells)} |"


def with_table(text: str) -> str:
    """Returns a document with the current table in the place of the old one."""
    return re.sub(rf"{re.escape(HEAD)}\n(\|.*\n)+", lambda _: table() + "\n", text)


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
