"""Three concepts in two styles, as three splits of a toy protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from dalle_zoo_eval.concepts.protocol import ConceptProtocol, find_concept_protocol

SPLITS = ("train", "val-styles", "val-concepts")


@pytest.fixture
def toy(make: Any, tmp_path: Path) -> Path:
    """File of a protocol whose splits have six images each, of noise."""
    for number, split in enumerate(SPLITS):
        for place, key in enumerate(f"{split}{concept}_{style}" for concept in "abc" for style in ("flat", "blob")):
            image = make.image(tmp_path / "data" / split / f"{key}.png", (16, 16), seed=10 * number + place)
            make.text(image.with_suffix(".txt"), f"a {key}")
    values = {
        "kind": "concepts", "name": "toy", "title": "Made-up images",
        "splits": {name: {"source": str(tmp_path / "data" / name)} for name in SPLITS},
        "candidates": 3, "chunk": 2,
        "targets": [
            {"measure": "share of the ceiling", "split": "train", "required": 0.8},
            {"measure": "bits saved", "split": "val-styles", "required": 0.3},
        ],
        "notes": ["Noise, all of it."],
    }  # fmt: skip
    values["splits"]["train"]["captions"] = 4
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def protocol(toy: Path) -> ConceptProtocol:
    return find_concept_protocol(toy)
