"""Small studies and scripted votes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dalle_zoo_eval.study.design import Study
from dalle_zoo_eval.study.make import Plan, make_study
from PIL import Image

CAPTIONS = ("a red <b>apple</b>", "two blue cats", "a green tree")


def write_systems(folder: Path, names: tuple[str, ...], captions: tuple[str, ...] = CAPTIONS, size: int = 16) -> Path:
    """Writes one folder of random images per system and ``captions.txt``."""
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir()
        for number in range(len(captions)):
            pixels = rng.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png", pnginfo=None)
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    return folder


MakeStudy = Callable[..., Study]


@pytest.fixture
def made(tmp_path: Path) -> MakeStudy:
    """Returns a function that makes a study in ``tmp_path / "study"``."""

    def make(
        names: tuple[str, ...] = ("ours", "theirs"), captions: tuple[str, ...] = CAPTIONS, **options: Any
    ) -> Study:
        write_systems(tmp_path, names, captions)
        systems = tuple((name, tmp_path / name) for name in names)
        return make_study(Plan(systems=systems, captions=tmp_path / "captions.txt", **options), tmp_path / "study")

    return make


def vote_for(study: Study, rater: int, pair: int, question: str, system: int | None) -> dict[str, object]:
    """Returns the vote of a rater who prefers a system; None is the scrambled image of a control pair."""
    image = study.pairs[pair].systems.index(system)
    right = bool(image) != study.flips[rater][pair]
    return {"pair": pair, "question": question, "answer": 2 if right else 1, "seconds": 1.5}


def exported(study: Study, rater: int, votes: list[dict[str, object]]) -> dict[str, object]:
    """Returns what the page of a rater exports."""
    return {"study": study.id, "rater": study.raters[rater].code, "votes": votes}


def shown_order(study: Study, rater: int) -> list[dict[str, Any]]:
    """Returns the pairs of a rater as they are displayed: number of the pair, caption, left and right image."""
    plan = study.raters[rater]
    shown = []
    for number, flipped in zip(plan.order, plan.flipped, strict=True):
        pair = study.pairs[number]
        left, right = reversed(pair.images) if flipped else pair.images
        shown.append({"pair": number, "caption": study.captions[pair.caption], "left": left, "right": right})
    return shown
