"""Distances and targets on made-up features and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval.concepts.figures import Generated, ranker_distances, ranker_sees, targets
from dalle_zoo_eval.concepts.protocol import ConceptProtocol, SplitRule, TargetRule
from dalle_zoo_eval.concepts.splits import Split

from dalle_zoo.pipeline import DallePipeline


def test_distances_in_the_rankers_features(model: Path) -> None:
    ranker = DallePipeline.from_pretrained(model).ranker
    assert ranker is not None
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split("train", [str(i) for i in range(40)], ["a"] * 40, images)
    seen = ranker_sees(ranker, images)
    gray = ranker_sees(ranker, torch.full_like(images, 128))
    generated = Generated(
        best=torch.zeros(40, dtype=torch.long), shown=images, features=None,
        ranker_features=torch.stack([seen, gray], 1),
    )  # fmt: skip
    found = ranker_distances(ranker, split, images, generated)
    assert found["best"] == pytest.approx(0, abs=1e-9)
    assert found["reconstructed"] == pytest.approx(0, abs=1e-9)
    assert found["one"] > 1e-3  # the mean of that and of gray images


def test_targets_compare_with_the_ceiling() -> None:
    def accuracy(best: float) -> dict[str, Any]:
        return {"real": {"top1": 0.1, "top5": 0.8}, "best": {"top1": 0.1, "top5": best}}

    def target(split: str, required: float, measure: str = "share of the ceiling") -> TargetRule:
        return TargetRule(measure=measure, split=split, required=required)

    protocol = ConceptProtocol(
        name="toy", title="Toy", splits={name: SplitRule(source=name) for name in ("train", "val-styles", "blind")},
        targets=(
            target("train", 0.8), target("val-styles", 0.5), target("blind", 0.5),
            target("val-styles", 0.5, "bits saved"), target("val-styles", 0.6, "bits saved"),
        ),
    )  # fmt: skip
    figures = {
        "train": {"concept_accuracy": accuracy(0.6)},
        "val-styles": {"concept_accuracy": accuracy(0.6), "bits": {"right": 3.0, "shuffled": 3.5, "none": 3.2}},
        "blind": {"concept_accuracy": {"real": {"top5": 0.0}, "best": {"top5": 0.0}}},
    }
    got = [(row["name"].rpartition(", ")[2], row["reached"], row["met"]) for row in targets(protocol, figures)]
    assert got == [
        ("train", pytest.approx(0.75), False),
        ("val-styles", pytest.approx(0.75), True),
        ("val-styles", 0.5, True),
        ("val-styles", 0.5, False),
    ]
