"""The protocol of the bundled model, and the committed result and report."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from dalle_zoo_eval.caption_lists import write_captions
from dalle_zoo_eval.command import main
from dalle_zoo_eval.protocol import Protocol, find_protocol, list_protocols
from dalle_zoo_eval.report import sheet_name, write_report

from dalle_zoo.data.sources import BUNDLED
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.results import read_result

RESULT = Path(__file__).parents[2] / "eval/results/emoji64.json"
CAPTIONS = Path(__file__).parents[2] / "eval/captions"


def test_protocol_file_has_expected_values() -> None:
    protocol = find_protocol("emoji64")
    groups, sampling = protocol.groups, protocol.sampling
    assert {group.dataset["source"] for group in groups.values()} == {f"emoji64:{name}" for name in BUNDLED["emoji64"]}
    assert [group.captions.count for group in groups.values()] == [256, None, None]
    assert {(group.samples, group.captions.rule) for group in groups.values()} == {(413, "first")}
    assert (sampling.candidates, sampling.chunk, sampling.seeds, protocol.seed) == (16, 8, "chunk", 0)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.guidance_scale) == (0.7, None, None, 1.0)
    targets = [
        (t.score["metric"], t.group, t.required, t.divided_by, t.minus) for t in protocol.targets
    ]  # fmt: skip
    assert targets == [
        ("concept_accuracy", "train", 0.8, {"images": "real"}, {}),
        ("concept_accuracy", "val-styles", 0.5, {"images": "real"}, {}),
        ("bits_per_token", "val-styles", 0.3, {}, {"part": "right"}),
    ]


def test_committed_result_has_committed_protocol() -> None:
    result = read_result(RESULT)
    measured, protocol = Protocol.from_dict(result["protocol"]), find_protocol("emoji64")
    # Titles and notes may change without a new evaluation.
    assert replace(measured, title="x", notes=()) == replace(protocol, title="x", notes=())
    assert Protocol.from_dict(json.loads(json.dumps(asdict(protocol)))) == protocol
    assert result["extractors"]["mobilenet"]["sha256"] == protocol.extractors["mobilenet"].sha256
    assert result["left_out"] == []
    assert [(target["required"], target["met"]) for target in result["targets"]] == [
        (rule.required, target["reached"] >= rule.required)
        for rule, target in zip(protocol.targets, result["targets"], strict=True)
    ]


def test_committed_report_equals_rendered_result(tmp_path: Path) -> None:
    folder = RESULT.with_suffix("")
    text = write_report([RESULT], tmp_path)[0].read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8") == text, "run `dalle-zoo report`"
    shown = set(re.findall(r"\]\((.+?\.png)\)", text))
    assert shown >= {sheet_name(name) for name in BUNDLED["emoji64"]}
    assert shown == {path.name for path in folder.glob("*.png")} == {path.name for path in tmp_path.glob("*.png")}


def test_misspelled_protocol_suggests_the_closest() -> None:
    assert "emoji64" in list_protocols()
    with pytest.raises(UnknownNameError, match="Did you mean 'emoji64'"):
        main(["emoji46"])


def test_help_shows_defaults_of_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["emoji64", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "sampling temperature [0.7]",
        "captions of the group train [256]",
        "keeps one [16]",
        "concept_accuracy",
    ):
        assert part in said


def test_the_published_captions_are_those_of_the_result(tmp_path: Path) -> None:
    paths = write_captions("emoji64", tmp_path)
    for path in paths:
        assert path.read_bytes() == (CAPTIONS / path.name).read_bytes()
    heads = [json.loads(path.read_text().partition("\n")[0])["sha256"] for path in paths]
    groups = json.loads(RESULT.read_text())["groups"]
    assert heads == [groups[path.stem.removeprefix("emoji64-")]["captions_sha256"] for path in paths]
