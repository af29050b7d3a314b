"""Parts of a report besides scores: the nearest training images, and everything that determines the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dalle_zoo_eval.comparison import Measured
from dalle_zoo_eval.documents import Block, Bullets, Heading, Paragraph, Table, field_table, field_text

COPIES = "memorization.png"
"""Sheet of the nearest training images."""


def copies_blocks(systems: Sequence[Measured]) -> Iterator[Block]:
    """Yields how many images have a near copy among training images, next to the images of the reference."""
    for system in systems:
        found = system.at("memorization")
        if not found:
            continue
        heading = "" if len(systems) == 1 else f", {system.name}"
        yield Heading(2, f"Nearest training images{heading}")
        rows = [[name, *_share_of_copies(each)] for name, each in (
            (system.name, found), ("reference images", found.get("reference")),
        ) if each]  # fmt: skip
        yield Table(["", f"cosine at least {field_text(found.get('threshold'))}, %", "median cosine"], rows)
        yield Paragraph(
            f"By {found['network']}, among {field_text(found.get('training_images'))} images of "
            f"{found.get('training')}; in brackets 95 % bootstrap intervals. Networks differ in how similar they find "
            f"images of one kind. A share above that of the reference points to copies; {COPIES} shows the closest "
            "pairs."
        )


def _share_of_copies(found: Mapping[str, Any]) -> list[str]:
    """Returns the share of images above the threshold with its interval, and the median."""
    interval = found.get("interval")
    between = f"\n[{', '.join(f'{100 * end:.1f}' for end in interval)}]" if interval else ""
    median = found.get("median_similarity")
    return [f"{100 * found['share_above']:.1f}{between}", "–" if median is None else f"{median:.3f}"]


def provenance_blocks(systems: Sequence[Measured]) -> Iterator[Block]:
    """Yields everything that determines the numbers: sources, datasets, extractors, self-checks, protocol."""
    first = systems[0].data["protocol"]
    hidden = ("notes", "targets", "overridden", "headlines")
    yield Heading(2, "What was measured")
    for system in systems:
        yield Heading(3, system.name)
        protocol = system.data["protocol"]
        parts = {
            "source": system.data["source"],
            "groups": system.data["groups"],
            "memorization": {k: v for k, v in (system.at("memorization") or {}).items() if k != "closest"},
            **{name: system.at(name) for name in ("speed", "code_version", "versions", "device", "run", "bootstrap")},
            "date": system.at("date"),
            "protocol": {k: v for k, v in protocol.items() if v != first.get(k) and k not in hidden},
        }
        yield field_table(parts)
        closest = system.at("memorization.closest") or []
        if closest:
            rows = [[field_text(pair.get(k)) for k in ("sample", "training", "similarity")] for pair in closest]
            yield Table(["sample", "nearest training image", "cosine"], rows)
        checks = system.data.get("selfcheck") or []
        if checks:
            head = ["self-check", "found", "expected", "passed"]
            yield Table(head, [[field_text(check.get(key)) for key in ("name", *head[1:])] for check in checks])
        yield Bullets([f"left out: {line}" for line in system.data.get("left_out") or []])
    extractors = {name: record for system in systems for name, record in (system.at("extractors") or {}).items()}
    if extractors:
        yield Heading(2, "Extractors")
        yield field_table(extractors)
    yield Heading(2, "Protocol")
    yield field_table({key: value for key, value in first.items() if key not in hidden})
