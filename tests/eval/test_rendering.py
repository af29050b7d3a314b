"""Reports of result files of any kind, rendered again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from dalle_zoo_eval.protocol import find_protocol
from PIL import Image

from dalle_zoo.cli.main import main

CONCEPTS = Path(__file__).parents[2] / "eval/results/emoji64.json"


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Result file of a benchmark, with a sheet beside it."""
    score = {"metric": "clip_score", "family": "clip", "value": 0.25, "samples": 4}
    path = tmp_path / "one/result.json"
    path.parent.mkdir()
    path.write_text(
        json.dumps(
            {
                "protocol": asdict(find_protocol("folder")),
                "subject": {"kind": "images", "name": "some"},
                "benchmark": {"sha256": "ab", "captions": 4},
                "scores": [score],
            }
        )
    )
    Image.new("RGB", (8, 8)).save(path.parent / "samples.png")
    return path


def test_one_benchmark_lies_where_it_was(benchmark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(benchmark)]) == 0
    assert capsys.readouterr().out.strip() == str(benchmark.with_name("report.html"))
    text = benchmark.with_name("report.md").read_text()
    assert "| some | CLIP score | clip |" in text
    assert "(samples.png)" in text


def test_several_of_one_benchmark_stand_side_by_side(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "two/result.json"
    other.parent.mkdir()
    other.write_text(benchmark.read_text().replace('"some"', '"another"'))
    assert main(["report", str(benchmark), str(other)]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    assert main(["report", str(benchmark), str(other), "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both/report.md").read_text()
    assert "| some |" in text
    assert "| another |" in text


def test_concepts_stand_alone(benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(CONCEPTS), "--out", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new/report.html").is_file()
    assert main(["report", str(CONCEPTS), str(benchmark), "--out", str(tmp_path / "both")]) == 2
    assert "results of kind 'concepts' stand alone" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(("text", "message"), [("[]", "has no protocol"), ("{", "not valid JSON")])
def test_other_files_are_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    assert message in capsys.readouterr().err
