"""Figures of result files: of both kinds, only with the weights that they were measured with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo import results, zoo
from dalle_zoo.cli.main import main
from dalle_zoo.results import figures, fits, measured_weights, results_of

ROOT = Path(__file__).parents[1]
SCORED: dict[str, Any] = {
    "protocol": {"name": "coco-30k", "title": "MS-COCO"},
    "subject": {"name": "toy", "weights_sha256": {"prior/model.safetensors": "aa"}},
    "scores": [
        {"metric": "fid", "family": "inception-2015", "value": 27.5, "samples": 30000, "candidates": 512, "blur": 0},
        {"metric": "is", "family": "inception-2015", "value": 17.9, "samples": 30000, "candidates": None},
    ],
}
SPLIT: dict[str, Any] = {
    "protocol": {"name": "mine", "seed": 3, "candidates": 16, "temperature": 0.7},
    "model": {"name": "toy", "weights_sha256": {"prior/model.safetensors": "aa"}},
    "splits": {"train": {"samples": 9, "psnr": 21.5, "bits": {"right": 3.25}}, "val": {"samples": 4, "psnr": 20.5}},
}
LISTED = {"prior/model.safetensors": "aa", "config.json": "bb"}


def test_figures_of_scores() -> None:
    fid, score = figures(SCORED)
    assert (fid.metric, fid.label, fid.value, fid.split) == ("fid", "fid (inception-2015)", 27.5, None)
    assert (fid.protocol, fid.title) == ("coco-30k", "MS-COCO")
    assert fid.settings == {"samples": 30000, "candidates": 512, "blur": 0}
    assert score.settings == {"samples": 30000}


def test_figures_of_splits() -> None:
    found = [(figure.metric, figure.split, figure.value) for figure in figures(SPLIT)]
    assert found == [("psnr", "train", 21.5), ("bits_right", "train", 3.25), ("psnr", "val", 20.5)]
    assert figures(SPLIT)[0].settings == {"samples": 9, "seed": 3, "candidates": 16, "temperature": 0.7}
    assert figures(SPLIT)[0].title == "mine"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({}, "has no 'protocol'"),
        ({"protocol": {"name": "x"}}, "has no 'splits'"),
        ({"protocol": {"name": "x"}, "scores": []}, "holds no figure"),
        ({"protocol": [], "scores": []}, "expected a result file"),
        ({"protocol": {"name": "x"}, "scores": [{"metric": "fid"}]}, "has no"),
    ],
)
def test_another_file_is_refused(result: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures(result)


def test_a_result_belongs_to_its_weights() -> None:
    for result in (SCORED, SPLIT):
        assert measured_weights(result) == {"prior/model.safetensors": "aa"}
        assert fits(result, LISTED)
        assert not fits(result, LISTED | {"prior/model.safetensors": "cc"})
        assert not fits(result, LISTED | {"ranker/model.safetensors": "dd"})
    assert not fits({"subject": {"name": "images"}}, {"config.json": "bb"}), "no weights are no match"


def test_results_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(results, "_ROOTS", (shipped,))
    model = tmp_path / "model"
    for folder in (shipped, model / "results"):
        folder.mkdir(parents=True)
    (shipped / "a.json").write_text(json.dumps(SPLIT))
    (shipped / "list.json").write_text("[]")
    (model / "results/b.json").write_text(json.dumps(SCORED))
    (model / "results/c.json").write_text(json.dumps(SCORED | {"subject": {"weights_sha256": {"x": "y"}}}))
    assert results_of(model) == {}, "without checksums nothing is known of the weights"
    (model / "sha256.json").write_text(json.dumps(LISTED))
    assert results_of(model) == {"a.json": SPLIT, "b.json": SCORED}


def test_the_list_of_models_shows_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = [record for record in zoo.list_models() if record.name == "emoji64"]
    measured = json.loads((ROOT / "eval/results/emoji64.json").read_text())
    found = {(figure.metric, figure.split): figure.value for figure in record.figures}
    assert found["psnr", "train"] == measured["splits"]["train"]["psnr"]
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    for fact in (record.license, record.data, f"{record.num_bytes / 1e6:.0f} MB"):
        assert fact in shown
    assert f"reconstruction PSNR, dB: {found['psnr', 'train']:.4g} (emoji64, train)" in shown


def test_listing_loads_no_torch() -> None:
    script = (
        "import sys; from dalle_zoo import list_models; list_models()[0].figures; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
