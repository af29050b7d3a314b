"""The protocol of the bundled model: what the file fixes, and that committed result and report belong to it."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest
from dalle_zoo_eval.command import main
from dalle_zoo_eval.concepts.protocol import ConceptProtocol, find_concept_protocol
from dalle_zoo_eval.concepts.report import read_concept_result, sheet_file, write_concept_report
from dalle_zoo_eval.concepts.splits import load_split
from dalle_zoo_eval.protocol import list_protocols

from dalle_zoo.data.sources import BUNDLED
from dalle_zoo.registry import UnknownNameError

RESULT = Path(__file__).parents[2] / "eval/results/emoji64.json"


def test_the_file_fixes_what_was_fixed() -> None:
    protocol = find_concept_protocol("emoji64")
    assert list_protocols("concepts") == ["emoji64"]
    assert {rule.source for rule in protocol.splits.values()} == {f"emoji64:{name}" for name in BUNDLED["emoji64"]}
    assert [rule.captions for rule in protocol.splits.values()] == [256, None, None]
    assert (protocol.samples, protocol.candidates, protocol.chunk, protocol.seed) == (413, 16, 8, 0)
    assert protocol.sampling() == {"temperature": 0.7, "top_k": None, "top_p": None, "guidance_scale": 1.0}
    targets = [(target.measure, target.split, target.required) for target in protocol.targets]
    assert targets == [
        ("share of the ceiling", "train", 0.8),
        ("share of the ceiling", "val-styles", 0.5),
        ("bits saved", "val-styles", 0.3),
    ]


def test_the_bundled_splits_load() -> None:
    split = load_split("val-styles", "emoji64:val-styles", 64)
    assert len(split.keys) == len(set(split.keys)) == 413
    assert split.images.shape == (413, 3, 64, 64)
    assert split.keys[0] == "267b_fluent-flat"
    assert split.concepts[0] == "267b"


def test_the_committed_result_was_measured_by_the_committed_protocol() -> None:
    result = read_concept_result(RESULT)
    measured, protocol = ConceptProtocol.from_dict(result["protocol"]), find_concept_protocol("emoji64")
    # Titles and notes may be worded better without measuring again.
    words = {"title": "", "notes": ()}
    assert asdict(measured) | words == asdict(protocol) | words
    assert result["evaluator"]["sha256"] == protocol.networks["mobilenet"].sha256
    assert result["left_out"] == []
    assert [(target["required"], target["met"]) for target in result["targets"]] == [
        (rule.required, target["reached"] >= rule.required)
        for rule, target in zip(protocol.targets, result["targets"], strict=True)
    ]


def test_the_committed_report_is_that_of_the_committed_result(tmp_path: Path) -> None:
    folder = RESULT.with_suffix("")
    text = write_concept_report(RESULT, tmp_path)[0].read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8") == text, "run `dalle-zoo report`"
    shown = set(re.findall(r"\]\((.+?\.png)\)", text))
    assert shown >= {sheet_file(RESULT, name).name for name in BUNDLED["emoji64"]}
    assert shown == {path.name for path in folder.glob("*.png")} == {path.name for path in tmp_path.glob("*.png")}


def test_a_wrong_protocol_is_answered_with_the_right_one() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'emoji64'"):
        main(["emoji46"])


def test_the_options_show_what_the_file_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["emoji64", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("sampling temperature (0.7)", "captions of train to sample (256)", "images per caption (16)"):
        assert part in said
