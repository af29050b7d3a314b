"""Figures of result files: of both kinds, only with the weights that they were measured with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo import model_results, zoo
from dalle_zoo.cli.main import main
from dalle_zoo.model_results import figures, fits, measured_weights, results_of
from dalle_zoo.results import ResultError, score_tables

ROOT = Path(__file__).parents[1]
METRICS = {
    name: {
        "label": label, "unit": unit, "format": ".2f", "section": "", "parts": parts, "sweep": False, "bars": False,
        "extractor": extractor, "lower_is_better": False,
    }
    for name, label, unit, parts, extractor in (
        ("fid", "FID", "", {}, ["inception-2015", "dmgan"]),
        ("is", "Inception score", "", {}, ["inception-2015"]),
        ("psnr", "reconstruction PSNR", "dB", {}, ["none"]),
        ("bits_per_token", "bits per image token", "", {"right": "right captions", "none": "no caption"}, ["prior"]),
        ("concept_accuracy", "concept accuracy", "%", {}, ["mobilenet"]),
    )
}  # fmt: skip
DATASET = {"name": "coco:val2014", "sha256": "cd"}
SCORED: dict[str, Any] = {
    "protocol": {"name": "coco-30k", "title": "MS-COCO"},
    "source": {"name": "toy", "weights_sha256": {"prior/model.safetensors": "aa"}},
    "groups": {"all": {"samples": 30000, "captions": 30000, "dataset": DATASET}},
    "metrics": METRICS,
    "scores": [
        {"metric": "fid", "family": "dmgan", "value": 27.5, "samples": 30000, "candidates": 512, "blur": 0},
        {"metric": "fid", "family": "inception-2015", "value": 26.5, "samples": 30000, "blur": 8},
        {"metric": "is", "family": "inception-2015", "value": 17.9, "samples": 30000, "candidates": None},
    ],
}
GROUPED: dict[str, Any] = {
    "protocol": {
        "name": "mine", "seed": 3, "sampling": {"candidates": 16, "temperature": 0.7},
        "headlines": [{"metric": "psnr"}, {"metric": "bits_per_token", "part": "right"}],
    },
    "source": {"name": "toy", "weights_sha256": {"prior/model.safetensors": "aa"}},
    "groups": {name: {"samples": n, "captions": n, "dataset": DATASET} for name, n in (("train", 9), ("val", 4))},
    "metrics": METRICS,
    "scores": [
        {"metric": "psnr", "group": "train", "images": "reconstructed", "value": 21.5, "samples": 9},
        {"metric": "psnr", "group": "val", "images": "reconstructed", "value": 20.5, "samples": 4},
        {"metric": "bits_per_token", "part": "right", "group": "train", "images": "real", "value": 3.25, "samples": 9},
        {"metric": "bits_per_token", "part": "none", "group": "train", "images": "real", "value": 4.5, "samples": 9},
        *(
            {"metric": "concept_accuracy", "part": "top5", "group": "val", "images": images, "value": value,
             "samples": 4, "candidates": candidates}
            for images, value, candidates in (("real", 0.5, None), ("generated", 0.25, 16), ("shuffled", 0.0, 16))
        ),
    ],
}  # fmt: skip
LISTED = {"prior/model.safetensors": "aa", "config.json": "bb"}


def test_figures_of_one_group() -> None:
    fid, other, score = figures(SCORED)
    assert (fid.metric, fid.label, fid.value, fid.split) == ("fid", "FID, dmgan, best of 512", 27.5, None)
    assert (fid.protocol, fid.title) == ("coco-30k", "MS-COCO")
    assert fid.settings == {"samples": 30000, "candidates": 512}
    assert (other.label, other.settings) == ("FID, inception-2015, blur 8", {"samples": 30000, "blur": 8})
    assert (score.label, score.settings) == ("Inception score", {"samples": 30000})


def test_headlines_of_several_groups() -> None:
    found = [(figure.metric, figure.split, figure.value) for figure in figures(GROUPED)]
    assert found == [("psnr", "train", 21.5), ("bits_per_token_right", "train", 3.25), ("psnr", "val", 20.5)]
    assert figures(GROUPED)[0].settings == {"samples": 9, "seed": 3, "temperature": 0.7}
    assert figures(GROUPED)[0].title == "mine"
    every = {**GROUPED, "protocol": {"name": "mine"}}
    assert len(figures(every)) == len(GROUPED["scores"])


def test_tables_have_a_column_for_each_group() -> None:
    assert score_tables(GROUPED) == {
        "Samples": [["samples", "9", "4"], ["captions generated from", "9", "4"]],
        "reconstruction PSNR": [["reconstruction PSNR, dB", "21.50", "20.50"]],
        "bits per image token": [
            ["bits per image token, right captions", "3.25", "–"], ["bits per image token, no caption", "4.50", "–"]
        ],
        "concept accuracy": [
            ["concept accuracy, top 5, real images (ceiling), %", "–", "50.00"],
            ["concept accuracy, top 5, best of 16, %", "–", "25.00"],
            ["concept accuracy, top 5, shuffled captions (floor), %", "–", "0.00"],
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({}, "has no protocol"),
        ({"protocol": {"name": "x"}}, "has no source"),
        (SCORED | {"scores": []}, "holds no score"),
        (SCORED | {"protocol": []}, "expected a result file"),
        (SCORED | {"scores": [{"metric": "fid"}]}, "score 1: .*missing"),
        (
            SCORED | {"scores": [SCORED["scores"][0] | {"group": "al"}]},
            "score 1: unknown group 'al'. Did you mean 'all'",
        ),
        (SCORED | {"scores": [SCORED["scores"][0] | {"images": "drawn"}]}, "images must be one of real, "),
    ],
)
def test_another_file_is_refused(result: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures(result)


def test_a_format_that_is_none_of_a_number() -> None:
    metrics = {**METRICS, "psnr": {**METRICS["psnr"], "format": "<script>"}}
    with pytest.raises(ResultError, match=r"metrics\.psnr\.format must be the format of a number, got '<script>'"):
        score_tables({**GROUPED, "metrics": metrics})


def test_a_result_belongs_to_its_weights() -> None:
    for result in (SCORED, GROUPED):
        assert measured_weights(result) == {"prior/model.safetensors": "aa"}
        assert fits(result, LISTED)
        assert not fits(result, LISTED | {"prior/model.safetensors": "cc"})
        assert not fits(result, LISTED | {"ranker/model.safetensors": "dd"})
    assert not fits({"source": {"name": "images"}}, {"config.json": "bb"}), "no weights are no match"


def test_results_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(model_results, "_ROOTS", (shipped,))
    model = tmp_path / "model"
    for folder in (shipped, model / "results"):
        folder.mkdir(parents=True)
    (shipped / "a.json").write_text(json.dumps(GROUPED))
    (shipped / "list.json").write_text("[]")
    (model / "results/b.json").write_text(json.dumps(SCORED))
    (model / "results/c.json").write_text(json.dumps(SCORED | {"source": {"weights_sha256": {"x": "y"}}}))
    assert results_of(model) == {}, "without checksums nothing is known of the weights"
    (model / "sha256.json").write_text(json.dumps(LISTED))
    assert results_of(model) == {"a.json": GROUPED, "b.json": SCORED}


def test_the_list_of_models_shows_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = [record for record in zoo.list_models() if record.name == "composition"]
    measured = json.loads((ROOT / "eval/results/composition.json").read_text())
    found = {(figure.metric, figure.split): figure.value for figure in record.figures}
    assert found["psnr", "plain"] == next(s["value"] for s in measured["scores"] if s["metric"] == "psnr")
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    for fact in (record.license, record.data, f"{record.num_bytes / 1e6:.0f} MB"):
        assert fact in shown
    assert f"reconstruction PSNR, dB: {found['psnr', 'plain']:.4g} (composition, plain)" in shown


def test_listing_loads_no_torch() -> None:
    script = (
        "import sys; from dalle_zoo import list_models; list_models()[0].figures; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["protocol"].update(title=3), "protocol.title must be text, got '3'"),
        (lambda r: r["protocol"].update(sampling=[]), "protocol.sampling must be an object"),
        (
            lambda r: r["protocol"].update(headlines=[{"metrics": "fid"}]),
            "protocol.headlines must be a list of objects",
        ),
        (lambda r: r["source"].update(weights_sha256=["aa"]), "source.weights_sha256 must be an object"),
        (lambda r: r.update(selfcheck=["passed"]), "selfcheck must be a list of objects"),
        (lambda r: r["groups"]["all"].update(dataset={}), "groups.all.dataset.sha256 must be text"),
        (lambda r: r["metrics"].update(fid=[]), "metrics.fid must be an object"),
        (lambda r: r["metrics"]["fid"].pop("label"), "metrics.fid.label must be text"),
        (
            lambda r: r["metrics"]["fid"].update(format=".999999999f"),
            "metrics.fid.format must be a format such as .2f",
        ),
        (lambda r: r["metrics"]["fid"].update(parts={"a": 1}), "metrics.fid.parts must be an object with texts"),
        (lambda r: r["metrics"]["fid"].update(extractor=1), "metrics.fid.extractor must be a list"),
    ],
)
def test_results_of_another_form_are_refused(change: Any, message: str) -> None:
    result = json.loads(json.dumps(SCORED))
    change(result)
    with pytest.raises(ResultError, match=message):
        figures(result)
