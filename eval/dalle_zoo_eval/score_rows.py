"""Scores of results, and the published scores that they compare with, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict

from dalle_zoo_eval.comparison import Measured
from dalle_zoo_eval.published import find_published

COLUMNS = (
    "system", "metric", "part", "family", "group", "images", "blur", "candidates", "value", "low", "high", "std",
    "at_infinity", "samples", "reference_samples", "rank_deficient", "source",
)  # fmt: skip


def scores_csv(systems: Sequence[Measured]) -> str:
    """Returns a row per score with all digits; shares are not multiplied by 100. Published rows follow."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    pairs = set()
    for system in systems:
        for score in system.scores:
            row = asdict(score)
            row["low"], row["high"] = row.pop("interval") or (None, None)
            writer.writerow({"system": system.name, **row, "source": "measured"})
            pairs.add((score.metric, score.family or ""))
    deduplicated = bool(systems[0].rule("captions.exclusions"))
    for name in systems[0].at("protocol.published") or ():
        table = find_published(name)
        for metric, family in sorted(pairs):
            for published in table.comparable_rows(metric, family, deduplicated=deduplicated):
                writer.writerow(
                    {
                        "system": published.system, "metric": metric, "family": family, "images": "generated",
                        "blur": published.blur, "candidates": published.candidates, "value": published.value,
                        "std": published.std, "samples": table.samples, "source": published.source,
                    }
                )  # fmt: skip
    return text.getvalue()
