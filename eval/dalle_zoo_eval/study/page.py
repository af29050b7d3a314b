"""The page of a study: one HTML file that works without a server and requests nothing but its images."""

from __future__ import annotations

import json
from pathlib import Path

from dalle_zoo_eval.study.design import Study

TEMPLATE = Path(__file__).with_name("page.html")
"""The page, with STUDY for its data and CONNECT for the addresses that it may send votes to."""


def page_html(study: Study, *, collect: bool = False) -> str:
    """Returns the page.

    It contains neither the names of the systems, nor which pairs are controls, nor the codes of the raters.

    Args:
        study: The study.
        collect: Whether the page sends votes to the server that it came from. Defaults to False: raters download
            their votes as a file, and the page may not connect to anything.
    """
    data = {
        "id": study.id,
        "title": study.title,
        "collect": collect,
        "questions": [{"id": q.id, "text": q.text, "neither": q.neither} for q in study.questions],
        "pairs": [[study.captions[pair.caption], *pair.images] for pair in study.pairs],
        "raters": [[rater.order, "".join("01"[flip] for flip in rater.flipped)] for rater in study.raters],
    }
    # No caption can end the script element, because "<" is written as an escape.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    before, _, after = TEMPLATE.read_text(encoding="utf-8").partition("STUDY")
    return before.replace("CONNECT", "'self'" if collect else "'none'") + text + after
