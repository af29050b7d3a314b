"""Reports on concepts: everything of the result file and nothing else."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.concepts import report
from dalle_zoo_eval.concepts.protocol import ConceptProtocol
from dalle_zoo_eval.concepts.report import concept_summary, read_concept_result, write_concept_report
from dalle_zoo_eval.rendering import render
from dalle_zoo_eval.results import ResultError
from PIL import Image

Bars = dict[str, dict[str, dict[str, float]]]


@pytest.fixture
def result(protocol: ConceptProtocol) -> dict[str, Any]:
    figures = {
        "samples": 6, "captions": 4, "keys_sha256": "ab", "captions_sha256": "cd", "psnr": 20.125,
        "codebook": {"used": 0.5, "perplexity": 3.25}, "bits": {"right": 1.0, "shuffled": 2.5, "none": 2.25},
        "retrieval": {f"{way}_top{k}": k / 10 for way in ("image_to_text", "text_to_image") for k in (1, 5)},
        "ranker_distance": {"reconstructed": 0.25, "best": 0.5, "one": 0.75},
        "concept_accuracy": {
            kind: {"top1": share / 2, "top5": share}
            for kind, share in (("real", 0.8), ("reconstructed", 0.6), ("best", 0.4), ("one", 0.2), ("shuffled", 0.0))
        },
    }  # fmt: skip
    return {
        "protocol": asdict(protocol),
        "model": {"name": "<toy> $x$", "weights_sha256": {"prior/model.safetensors": "ef"}},
        "evaluator": {"name": "MobileNet", "sha256": "12", "pixels": 128},
        "splits": {name: deepcopy(figures) for name in protocol.splits},
        "targets": [
            {"name": "share, train", "required": 0.8, "reached": 0.5, "met": False},
            {"name": "bits, val-styles", "required": 0.3, "reached": 1.5, "met": True},
        ],
        "left_out": [],
        "code_version": "1.2+abc", "versions": {"torch": "2.13"}, "device": "cpu", "date": "2026-01-02",
    }  # fmt: skip


@pytest.fixture
def file(result: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "results/toy.json"
    path.parent.mkdir()
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    """What every figure shows, by its title; nothing is sampled."""
    seen: Bars = {}
    monkeypatch.setattr(report, "bar_figure", lambda bars, title, score: seen.update({title: bars}) or b"")
    return seen


def test_a_report_has_every_figure(file: Path, bars: Bars) -> None:
    text = write_concept_report(file)[0].read_text()
    for expected in (
        "# Made-up images",
        "model &lt;toy&gt; \\$x\\$",
        "- Noise, all of it.",
        "| share, train | 0.8 | 0.500 | not reached |",
        "| bits, val-styles | 0.3 | 1.500 | reached |",
        "|  | train | val-styles | val-concepts |",
        "| prompts | 4 | 4 | 4 |",
        "| reconstruction PSNR, dB | 20.12 | 20.12 | 20.12 |",
        "| perplexity of the codes | 3.2 | 3.2 | 3.2 |",
        "| bits per image token, shuffled captions | 2.500 | 2.500 | 2.500 |",
        "| ranker, caption to image, top 5, % | 50.0 | 50.0 | 50.0 |",
        "| concept accuracy, top 1, real images (ceiling), % | 40.0 | 40.0 | 40.0 |",
        "| concept accuracy, top 5, best of 3, % | 40.0 | 40.0 | 40.0 |",
        "| concept accuracy, top 5, shuffled captions (floor), % | 0.0 | 0.0 | 0.0 |",
        "| distance in the ranker's features, one image | 0.750 | 0.750 | 0.750 |",
        "![Concept accuracy, top 5](concept-accuracy-top5.png)",
        "| evaluator.sha256 | 12 |",
        "| model.weights\\_sha256.prior/model.safetensors | ef |",
        "| splits.train.captions\\_sha256 | cd |",
        "| code\\_version | 1.2+abc |",
        "| chunk | 2 |",
        "| splits.train.captions | 4 |",
    ):
        assert expected in text, expected
    assert "FID" not in text
    assert list(bars["Concept accuracy, top 1"]) == [
        "real images (ceiling)", "reconstructions", "best of 3", "one image", "shuffled captions (floor)"
    ]  # fmt: skip
    assert bars["Concept accuracy, top 5"]["best of 3"] == dict.fromkeys(("train", "val-styles", "val-concepts"), 40.0)
    assert bars["Bits per image token"]["no caption"]["val-styles"] == 2.25


def test_the_same_file_gives_the_same_report(file: Path, tmp_path: Path) -> None:
    written = write_concept_report(file)
    again = render([file], tmp_path / "elsewhere")
    assert [path.name for path in written] == [path.name for path in again]
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    with Image.open(file.parent / "toy/bits.png") as image:
        assert image.width > image.height


def test_sheets_that_lie_beside_the_result_are_shown(file: Path, tmp_path: Path, bars: Bars) -> None:
    (file.parent / "toy").mkdir()
    Image.new("RGB", (8, 8)).save(file.parent / "toy/samples-val-styles.png")
    files = write_concept_report(file, tmp_path / "elsewhere")
    assert "![Samples: samples-val-styles](samples-val-styles.png)" in files[0].read_text()
    assert (tmp_path / "elsewhere/samples-val-styles.png").is_file()
    (file.parent / "toy/samples-train.png").write_text("torn")
    with pytest.raises(ResultError, match=r"samples-train\.png cannot be read as a PNG file"):
        write_concept_report(file, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_what_was_not_measured_has_no_row(result: dict[str, Any], bars: Bars) -> None:
    for figures in result["splits"].values():
        del figures["concept_accuracy"]["best"], figures["retrieval"]
        figures["ranker_distance"] = {}
    text = concept_summary(result)
    assert "best of" not in text
    assert "Retrieval" not in text
    assert "Distance" not in text
    assert "best of 3" not in bars["Concept accuracy, top 1"]


@pytest.mark.usefixtures("bars")
def test_numbers_by_other_values_than_the_protocols_meet_no_target(
    result: dict[str, Any], protocol: ConceptProtocol
) -> None:
    result["protocol"] = json.loads(json.dumps(asdict(protocol.changed(candidates=2, train_captions=2))))
    text = concept_summary(result)
    for target in ("| share, train | 0.8 | 0.500", "| bits, val-styles | 0.3 | 1.500"):
        assert f"{target} | not the protocol's numbers |" in text
    assert (
        "Measured with other values than those of toy:\n\n- candidates: 2 instead of 3\n- captions of train: 2" in text
    )
    result["protocol"]["overridden"] = []
    assert "Measured with other values" not in concept_summary(result)


@pytest.mark.usefixtures("bars")
def test_it_is_said_where_no_caption_does_better(result: dict[str, Any]) -> None:
    assert "better without a caption" not in concept_summary(result)
    for split in ("val-styles", "val-concepts"):
        result["splits"][split]["bits"]["none"] = 0.9
    assert "On val-styles and val-concepts the right captions cost bits" in concept_summary(result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("targets"), "has no targets: expected a result file of kind 'concepts'"),
        (lambda r: r["protocol"].update(kind="concept"), "unknown kind 'concept'"),
        (lambda r: r["splits"].pop("train"), "splits must be train, val-styles, val-concepts, got val-styles"),
        (lambda r: r["splits"]["train"].pop("bits"), "split train has no bits: measure again"),
    ],
)
def test_wrong_files_are_refused(result: dict[str, Any], tmp_path: Path, change: Any, message: str) -> None:
    change(result)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(result))
    with pytest.raises(ResultError, match=message):
        read_concept_result(path)
    path.write_text("{")
    with pytest.raises(ResultError, match="is not valid JSON"):
        read_concept_result(path)
