"""The stored benchmark of the evaluation has the keys that the current script writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

ROOT = Path(__file__).parents[2]


class Means:
    """Returns channel means."""

    name = "inception-2015"
    record: dict[str, str] = {"sha256": "0"}  # noqa: RUF012

    def prepare(self, images: Tensor) -> Tensor:
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": images.float().mean((2, 3))}


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", ROOT / "benchmarks" / "evaluation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stored_result_matches_benchmark_script(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(script, "open_inception", lambda *_: Means())
    out = tmp_path / "evaluation.json"
    arguments = ["evaluation.py", "--images", "6", "--size", "16", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    script.main()
    made, stored = (json.loads(path.read_text()) for path in (out, ROOT / "benchmarks/results/evaluation.json"))
    assert list(stored) == list(made)
    assert list(stored["cases"]) == list(made["cases"])
    for case, found in made["cases"].items():
        assert list(stored["cases"][case]) == list(found)
        assert stored["cases"][case]["radii"] == found["radii"]
        assert stored["cases"][case]["largest difference of the features"] == 0
