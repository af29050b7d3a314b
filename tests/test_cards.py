"""Cards say what the files say, and committed cards are those of the committed files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dalle_zoo import cards, zoo
from dalle_zoo.cards import check_weights, render_card, write_card
from dalle_zoo.files import read_json
from dalle_zoo.model_folder import ModelFolderError

ROOT = Path(__file__).parents[1]
CARD = ROOT / "model_cards/composition.md"
RESULT = ROOT / "eval/results/composition.json"


def spec(label: str, form: str, unit: str = "", extractor: str = "x", **parts: str) -> dict[str, Any]:
    return {
        "label": label, "unit": unit, "format": form, "section": "", "parts": parts, "extractor": [extractor],
        "sweep": False, "bars": False, "lower_is_better": False,
    }  # fmt: skip


def scores(group: str, psnr: float) -> list[dict[str, Any]]:
    rows = [
        ("psnr", None, "reconstructed", psnr), ("codebook_use", "used", "real", 0.75),
        ("bits_per_token", "shuffled", "real", 3.5), ("concept_accuracy", "top5", "generated", 0.5),
        ("concept_accuracy", "top5", "real", 0.75),
    ]  # fmt: skip
    return [
        {"metric": metric, "part": part, "images": images, "value": value, "samples": 9, "group": group,
         "candidates": 16 if images == "generated" else None}
        for metric, part, images, value in rows
    ]  # fmt: skip


@pytest.fixture
def result() -> dict[str, Any]:
    groups = {"train": 27.126, "val-styles": 26.5}
    return {
        "protocol": {
            "name": "composition", "seed": 7, "notes": ["PSNR is a mean.", "It is no FID."],
            "sampling": {"candidates": 16, "temperature": 0.9, "top_k": None, "top_p": None, "guidance_scale": 1.0},
        },
        "source": {"name": "composition", "weights_sha256": {"prior/model.safetensors": "aa"}},
        "groups": {name: {"samples": 413, "captions": 256, "dataset": {"sha256": "cd"}} for name in groups},
        "extractors": {"mobilenet": {"title": "MobileNet", "sha256": "f" * 64, "pixels": 128}},
        "metrics": {
            "psnr": spec("reconstruction PSNR", ".2f", "dB"), "codebook_use": spec("", ".1f", used="codes used, %"),
            "bits_per_token": spec("bits per image token", ".3f", shuffled="shuffled captions"),
            "concept_accuracy": spec("concept accuracy", ".1f", "%"),
        },
        "scores": [score for name, psnr in groups.items() for score in scores(name, psnr)],
        "targets": [
            {"name": "first", "required": 0.8, "reached": 0.9, "met": True},
            {"name": "second", "required": 0.3, "reached": 0.1, "met": False},
        ],
        "left_out": ["retrieval: the model has no ranker"],
        "code_version": "0.1.0", "versions": {"torch": "2.13"}, "device": "cpu",
        "date": "2026-01-02",
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "composition"
    folder.mkdir()
    files = {
        "record.json": {
            "description": "A toy.", "license": "Apache-2.0", "data": "Six images.",
            "parameters": {"dvae": 1234, "prior": 5}, "results": {},
        },
        "model_index.json": {"_class_name": "x", "dvae": ["a", "b"], "tokenizer": ["a", "b"]},
        "sha256.json": {"prior/model.safetensors": "aa", "config.json": "bb"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_card_of_other_values_than_the_protocols_meets_no_target(folder: Path, result: dict[str, Any]) -> None:
    result["protocol"]["overridden"] = ["candidates: 2 instead of 16"]
    text = render_card(folder, result)
    for target in ("| first | 0.80 | 0.90", "| second | 0.30 | 0.10"):
        assert f"{target} | not the protocol's numbers |" in text


def test_a_card_holds_text_that_utf8_cannot_express(folder: Path, result: dict[str, Any], tmp_path: Path) -> None:
    for path, value in {folder / "record.json": "description", tmp_path / "result.json": "device"}.items():
        content = read_json(path) if path.exists() else result
        path.write_text(json.dumps(content | {value: "half \ud83d"}))
    card = write_card(folder, tmp_path / "result.json", tmp_path / "card.md")
    assert r"half \ud83d" in card.read_text(encoding="utf-8").replace("\\\\", "\\")


def test_a_card_holds_the_figures(folder: Path, result: dict[str, Any]) -> None:
    text = render_card(folder, result)
    for expected in (
        "# composition",
        "license: Apache-2.0",
        "| dvae | 1,234 |",
        "| tokenizer | – |",
        "|  | train | val-styles |",
        "| samples | 413 | 413 |",
        "| reconstruction PSNR, dB | 27.13 | 26.50 |",
        "| codes used, % | 75.0 | 75.0 |",
        "| bits per image token, shuffled captions | 3.500 | 3.500 |",
        "| concept accuracy, top 5, best of 16, % | 50.0 | 50.0 |",
        "- Not measured: retrieval: the model has no ranker.",
        "| first | 0.80 | 0.90 | reached |",
        "| second | 0.30 | 0.10 | not reached |",
        "seed 7",
        "(temperature 0.9).",
        "\n- PSNR is a mean.\n- It is no FID.\n",
        "dalle-zoo fit dvae/composition",
    ):
        assert expected in text, expected
    assert "retrieval, " not in text  # no row without figures
    assert "$" not in text
    assert text == render_card(folder, result)


def test_a_card_needs_figures_of_its_own_weights(folder: Path, result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    out = write_card(folder, file, tmp_path / "cards/composition.md")
    assert out.read_text() == render_card(folder, result)
    result["source"]["weights_sha256"]["prior/model.safetensors"] = "cc"
    with pytest.raises(ModelFolderError, match=r"prior/model\.safetensors"):
        check_weights(folder, result)


def test_an_unknown_protocol_has_no_card(folder: Path, result: dict[str, Any]) -> None:
    result["protocol"]["name"] = "compositoin"
    with pytest.raises(ValueError, match="Did you mean 'composition'"):
        render_card(folder, result)


def test_the_committed_card_is_that_of_the_committed_files() -> None:
    result, folder = read_json(RESULT), zoo.BUNDLED / "composition"
    check_weights(folder, result)
    assert CARD.read_text(encoding="utf-8") == render_card(folder, result), "run `dalle-zoo card`"


HOSTILE = "<script>alert(1)</script><img src=x onerror=a>|`x`**b** [a](javascript:b) ![i](http://x) $x$\n# </td>"


def hostile(value: Any, retained: tuple[str, ...] = ()) -> Any:
    """Every text of plain data replaced by one with HTML and Markdown, except the values of some keys."""
    if isinstance(value, dict):
        return {key: inner if key in retained else hostile(inner, retained) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner, retained) for inner in value]
    return HOSTILE if isinstance(value, str) else value


def test_neither_html_nor_links_reach_a_card(folder: Path, result: dict[str, Any]) -> None:
    retained = ("name", "metric", "format", "group", "images", "part", "weights_sha256", "extractor")
    bad = hostile(result, retained)
    bad["sampling"] = result["protocol"]["sampling"]
    record = read_json(folder / "record.json")
    (folder / "record.json").write_text(json.dumps(hostile(record)))
    for text in (
        render_card(folder, bad, name="a`b<script>"),
        cards.render_any_card(folder, [], name='"] <img src=x>'),
    ):
        assert "alert(1)" in text
        for raw in ("<script", "<img", "</td>", "[a](", "![i]("):
            assert raw not in text.replace("<!--", ""), raw
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert all(line.replace("\\|", "").count("|") >= 3 for line in rows)
