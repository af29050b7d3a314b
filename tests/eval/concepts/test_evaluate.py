"""The protocol from end to end on a toy model: complete, resumable, honest about what is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.concepts import evaluate
from dalle_zoo_eval.concepts.evaluate import evaluate_concepts
from dalle_zoo_eval.concepts.protocol import ConceptProtocol
from dalle_zoo_eval.concepts.report import write_concept_report
from dalle_zoo_eval.measuring import Share
from dalle_zoo_eval.protocol import NetworkRule
from PIL import Image

from dalle_zoo.cli.main import main
from dalle_zoo.pipeline import DallePipeline

KINDS = {"real", "reconstructed", "one", "best", "shuffled"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Captions of every call of the pipeline; the fifth call is killed if the list is told so by a first entry."""
    seen: list[list[str]] = []
    sample = DallePipeline.__call__

    def counting(self: DallePipeline, prompt: list[str], **options: Any) -> Any:
        seen.append(prompt)
        if seen[0] == ["kill"] and len(seen) == 6:
            raise KeyboardInterrupt
        return sample(self, prompt, **options)

    monkeypatch.setattr(DallePipeline, "__call__", counting)
    return seen


def test_a_result_holds_everything(
    protocol: ConceptProtocol, model: Path, mobilenet: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    out = tmp_path / "a" / "r.json"
    complete = evaluate_concepts(protocol, str(model), str(mobilenet), out)
    assert complete is not None
    assert json.loads(out.read_text()) == json.loads(json.dumps(complete))
    assert complete["left_out"] == []
    assert complete["evaluator"]["pixels"] == 128
    assert list(complete["model"]["weights_sha256"]) == [
        "dvae/model.safetensors", "prior/model.safetensors", "ranker/model.safetensors"
    ]  # fmt: skip
    for name, captions in (("train", 4), ("val-styles", 6), ("val-concepts", 6)):
        figures = complete["splits"][name]
        assert (figures["samples"], figures["captions"]) == (6, captions)
        # An untrained prior is uniform over its 8 codes, whatever the caption.
        assert figures["bits"] == pytest.approx(dict.fromkeys(("right", "shuffled", "none"), 3.0))
        assert set(figures["concept_accuracy"]) == KINDS
        assert figures["retrieval"].keys() >= {"image_to_text_top1", "text_to_image_top5"}
        assert figures["ranker_distance"] == {}  # six images are too few for eight features
        with Image.open(tmp_path / f"a/r/samples-{name}.png") as sheet:
            assert sheet.width > 100
    # Among noise no real image has its concept near it: there is no ceiling to reach a share of.
    assert complete["splits"]["train"]["concept_accuracy"]["real"]["top5"] == 0
    assert [target["name"].partition(" ")[0] for target in complete["targets"]] == ["bits"]
    assert {path.name for path in (tmp_path / "a/r").iterdir()} == {
        "report.md", "report.html", "bits.png", "concept-accuracy-top1.png", "concept-accuracy-top5.png",
        "samples-train.png", "samples-val-styles.png", "samples-val-concepts.png",
    }  # fmt: skip

    # Another seed is resampled, the same one is not.
    assert [len(prompt) for prompt in calls] == [2] * 8  # 2 + 3 + 3 chunks
    evaluate_concepts(protocol, str(model), None, tmp_path / "a" / "s.json")
    assert len(calls) == 8
    evaluate_concepts(replace(protocol, seed=1), str(model), None, tmp_path / "a" / "t.json")
    assert len(calls) == 16


def test_killed_and_shared_runs_end_as_one_left_alone(
    protocol: ConceptProtocol, model: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    alone = evaluate_concepts(protocol, str(model), None, tmp_path / "alone/r.json")
    calls[:] = [["kill"]]
    out = tmp_path / "killed/r.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_concepts(protocol, str(model), None, out)
    assert [path.name for path in out.parent.iterdir()] == [".cache"]
    assert evaluate_concepts(protocol, str(model), None, out) == alone
    assert len(calls) == 1 + 8 + 1  # one of them twice

    calls.clear()
    out = tmp_path / "shared/r.json"
    assert evaluate_concepts(protocol, str(model), None, out, share=Share(rank=1, world=3)) is None
    assert len(calls) == 3  # chunks 1, 4, 7
    assert not out.exists()
    assert evaluate_concepts(protocol, str(model), None, out, share=Share(rank=0, world=3)) == alone
    assert len(calls) == 8
    # A process that comes late finds its share done and the result written, and has nothing to say about it.
    assert evaluate_concepts(protocol, str(model), None, out, share=Share(rank=2, world=3)) is None
    assert len(calls) == 8


@pytest.mark.parametrize("writer", ["save_png", "write_report_of", "write_json"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_killed_while_it_writes_is_continued_by_the_same_call(
    writer: str, after: bool, protocol: ConceptProtocol, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "r.json", getattr(evaluate, writer)

    def killed(*arguments: Any) -> None:
        if after:
            write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, writer, killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate_concepts(protocol, str(model), None, out)
    if (writer, after) == ("write_json", True):  # all is written, and nothing is to be continued
        assert {path.name for path in (tmp_path / "r").glob("report.*")} == {"report.md", "report.html"}
        return
    assert not out.exists()
    result = evaluate_concepts(protocol, str(model), None, out)
    assert json.loads(out.read_text()) == result
    report = (tmp_path / "r/report.md").read_bytes()
    assert write_concept_report(out, tmp_path / "again")[0].read_bytes() == report


def test_a_damaged_chunk_is_named(protocol: ConceptProtocol, model: Path, tmp_path: Path) -> None:
    evaluate_concepts(protocol, str(model), None, tmp_path / "r.json")
    chunk = sorted((tmp_path / ".cache").iterdir())[0]
    chunk.write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{chunk.name} cannot be read .*: delete it and run again"):
        evaluate_concepts(protocol, str(model), None, tmp_path / "s.json")


def test_without_evaluator_and_ranker_it_says_so(protocol: ConceptProtocol, model: Path, tmp_path: Path) -> None:
    pipe = DallePipeline.from_pretrained(model)
    bare = DallePipeline(pipe.image_tokenizer, pipe.prior, pipe.tokenizer)
    bare.save_pretrained(tmp_path / "bare")
    result = evaluate_concepts(protocol, str(tmp_path / "bare"), None, tmp_path / "r.json")
    assert result is not None
    assert [line.split(":")[0] for line in result["left_out"]] == [
        "concept accuracy",
        "retrieval and best candidate",
    ]
    assert "concept_accuracy" not in result["splits"]["train"]
    assert result["evaluator"] is None
    text = (tmp_path / "r/report.md").read_text()
    assert "- concept accuracy: no evaluator was given" in text
    assert "## Concept accuracy" not in text
    assert "## Retrieval" not in text


def test_without_a_ranker_concepts_are_looked_for_in_one_image(
    protocol: ConceptProtocol, model: Path, mobilenet: Path, tmp_path: Path
) -> None:
    pipe = DallePipeline.from_pretrained(model)
    DallePipeline(pipe.image_tokenizer, pipe.prior, pipe.tokenizer).save_pretrained(tmp_path / "bare")
    result = evaluate_concepts(protocol, str(tmp_path / "bare"), str(mobilenet), tmp_path / "r.json")
    assert result is not None
    assert set(result["splits"]["train"]["concept_accuracy"]) == KINDS - {"best"}
    assert [target["name"].partition(" ")[0] for target in result["targets"]] == ["bits"]
    assert (tmp_path / "r/concept-accuracy-top1.png").is_file()


def test_wrong_requests_are_refused_before_any_work(
    protocol: ConceptProtocol, model: Path, mobilenet: Path, tmp_path: Path, calls: list[list[str]]
) -> None:
    (tmp_path / "r.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"r\.json: already there; .*--overwrite"):
        evaluate_concepts(protocol, str(model), None, tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == "mine"
    with pytest.raises(ValueError, match=r"out must end in \.json, got 'results'"):
        evaluate_concepts(protocol, str(model), None, Path("results"))
    with pytest.raises(ValueError, match="temperature must be a finite number of at least 0"):
        evaluate_concepts(replace(protocol, temperature=-1.0), str(model), None, tmp_path / "s.json")
    other = replace(protocol, networks={"mobilenet": NetworkRule(sha256="ab" * 32)})
    with pytest.raises(ValueError, match=r"has sha256 \w+, toy means (ab)+: concept accuracy by other weights"):
        evaluate_concepts(other, str(model), str(mobilenet), tmp_path / "s.json")
    assert not calls


def test_the_command(toy: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    options = ["--train-captions", "2", "--val-captions", "4", "--candidates", "2", "--temperature", "0.5"]
    command = ["eval", str(toy), "--model", str(model), "--out", str(out)]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().out
    assert "left out: concept accuracy" in said
    assert f"report: {tmp_path / 'r/report.html'}" in said
    assert "| samples | 6 | 6 | 6 |" in said
    result = json.loads(out.read_text())
    protocol = result["protocol"]
    assert (protocol["candidates"], protocol["temperature"], protocol["seed"]) == (2, 0.5, 0)
    assert [figures["captions"] for figures in result["splits"].values()] == [2, 4, 4]
    assert main([*command, "--overwrite", "--device", "nonsense"]) == 2
    assert "device 'nonsense' cannot be used" in capsys.readouterr().err
    assert main(command) == 2
    assert "already there" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(out.read_text())["protocol"]["candidates"] == 3
