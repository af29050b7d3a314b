"""Writes docs/evaluate/published.md: every published score, with the command that measures the same thing here.

    python tools/published_page.py

A test compares the document with the tables in eval/published.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dalle_zoo_eval.extractors import EXTRACTORS
from dalle_zoo_eval.protocol import find_protocol
from dalle_zoo_eval.published import (
    MARKS,
    SCORE_FAMILIES,
    PublishedRow,
    PublishedTable,
    find_published,
    list_published,
)

DOCUMENT = Path(__file__).parents[1] / "docs/evaluate/published.md"
DATASETS = {"coco": ("coco-30k", "COCO"), "cub": ("cub", "CUB")}
"""Protocol of a table, and what stands for the folder of its data in commands."""
LABELS = {
    "fid": "FID", "is": "Inception score", "clip_score": "CLIP score", "caption_loss": "caption loss",
    "human_realism": "votes for realism, %", "human_match": "votes for the match of the caption, %",
    "human_quality": "votes for quality, %",
}  # fmt: skip
HEAD = """\
# Published scores

Every published score that reports show next to measured ones, with the command that measures the same quantity. This
page is made from `eval/published` by `python tools/published_page.py`. `IMAGES` is a folder of
images of the system; `--model MODEL --candidates N` instead generates them, with N as in the row. The protocols
measure every blur radius of the rows. A measured value agrees if it is within the stated interval: that of reading a
figure (±), or the deviation that the source gives (std). Where none is stated, expect the bootstrap interval of the
measured value to hold it.

## Which FID is this paper's?

Two networks are called FID, and their scores of the same images differ by several points. A score is comparable only
with scores of its family:

"""


def page() -> str:
    """Returns the document."""
    tables = [find_published(name) for name in list_published()]
    return HEAD + "\n".join([*_families(tables), *(line for table in tables for line in _table(table))]) + "\n"


def _families(tables: list[PublishedTable]) -> Iterator[str]:
    rows = [row for table in tables for row in table.rows if row.metric == "fid" and not row.do_not_use]
    yield "| family | network |\n|---|---|"
    for family in dict.fromkeys(row.family for row in rows):
        yield f"| `{family}` | {SCORE_FAMILIES[family]} |"
    systems: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        systems[row.source.partition(",")[0]][row.family][row.system] = None
    yield "\n| paper or code | family of its FID | of |\n|---|---|---|"
    for source, families in sorted(systems.items(), key=lambda item: item[0].lower()):
        for family, names in families.items():
            yield f"| {source} | `{family}` | {'; '.join(names)} |"
    yield "\nThe marks below say how a number is known: " + "; ".join(f"{k}, {v}" for k, v in MARKS.items()) + ".\n"


def _table(table: PublishedTable) -> Iterator[str]:
    groups: dict[tuple[str, str, bool], list[PublishedRow]] = defaultdict(list)
    for row in table.rows:
        if not row.do_not_use:
            groups[row.metric, row.family, row.overlap == "deduplicated"].append(row)
    yield f"## {table.title}\n"
    for (metric, family, deduplicated), rows in groups.items():
        without = " without overlaps" if deduplicated else ""
        yield f"### {LABELS[metric]}, {family}{without}, {table.title.partition(',')[0]}\n"
        yield from _how(table, metric, family, deduplicated=deduplicated)
        yield "| system | setting | candidates | blur | expected | source |\n|---|---|---|---|---|---|"
        yield from map(_row, rows)
        yield ""


def _how(table: PublishedTable, metric: str, family: str, *, deduplicated: bool) -> Iterator[str]:
    """Yields the command and the files with their sha256, or why there is none."""
    if family == "human":
        yield "Measured by [`dalle-zoo study`](human-study.md).\n"
        return
    if family not in EXTRACTORS:
        yield f"Not measured here: {SCORE_FAMILIES[family]}.\n"
        return
    name, data = DATASETS[table.name]
    name = f"{name}-dedup" if deduplicated else name
    spec = EXTRACTORS.spec(family)
    if deduplicated and table.name != "coco":
        yield "No protocol leaves out overlaps of this data set; copy the protocol and add `exclusions: true`.\n"
        return
    needed = {n for rule in find_protocol(name).metrics for n in rule.extractor} - {family}
    left_out = "".join(f" --leave-out {other}" for other in sorted(needed))
    more = " --exclusions overlaps.txt" if deduplicated else ""
    file = spec.weights[0] if spec.weights else None
    location = file.name if file else f"{family}/"
    yield (
        f"```sh\ndalle-zoo eval {name} --images IMAGES --data {data}{more} --out eval-{name} \\\n"
        f"    --network {family}={location} \\\n   {left_out}\n```\n"
    )
    files = "; ".join(f"`{each.name}`, sha256 `{each.sha256}`" for each in spec.weights)
    yield f"Network: {files}. Images: {table.samples or 'all captions of the split'}.\n" if files else ""


def _row(row: PublishedRow) -> str:
    interval = f" ± {row.error:g}" if row.error is not None else f" (std {row.std:g})" if row.std is not None else ""
    setting = "; ".join(text for text in (row.setting, row.note) if text)
    about = "~" if row.approximate else ""
    cells = [
        row.system, setting, str(row.candidates or "–"), str(row.blur), f"{about}{row.value:g}{interval}",
        f"{row.source} [{row.marks}]",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
