"""Protocols with several groups: prompts chosen by seed, one resumable result, listed omissions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dalle_zoo_eval import runner
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.generation import GeneratedImages
from dalle_zoo_eval.groups import choose, read_prompts
from dalle_zoo_eval.protocol import Protocol, find_protocol
from dalle_zoo_eval.report import write_report
from dalle_zoo_eval.request import Request
from dalle_zoo_eval.rules import SamplingRule
from dalle_zoo_eval.runner import evaluate
from PIL import Image

from dalle_zoo.claims import Claims
from dalle_zoo.cli.main import main
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sharing import Share

SETS = {"real", "reconstructed", "generated", "candidates", "shuffled"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the captions of every sampling call; a first entry in the list makes the fifth call fail."""
    seen: list[list[str]] = []
    sample = GeneratedImages._sample

    def counting(self: GeneratedImages, captions: list[str], seeds: Any, given: Any = None) -> Any:
        seen.append(captions)
        if seen[0] == ["kill"] and len(seen) == 6:
            raise KeyboardInterrupt
        return sample(self, captions, seeds, given)

    monkeypatch.setattr(GeneratedImages, "_sample", counting)
    return seen


Ask = Callable[..., Request]


@pytest.fixture
def ask(toy: Path, model: Path, mobilenet: Path) -> Ask:
    def request(out: Path, **more: Any) -> Request:
        given = {"networks": {"mobilenet": mobilenet}, "model": str(model), **more}
        return Request(protocol=str(toy), out=out, **given)

    return request


def values(result: dict[str, Any] | None, metric: str, group: str, images: str | None = None) -> dict[str, float]:
    """Scores of a metric by part."""
    assert result is not None
    rows = [r for r in result["scores"] if (r["metric"], r["group"]) == (metric, group)]
    return {r["part"] or "value": r["value"] for r in rows if images in (None, r["images"])}


def lasting(result: dict[str, Any] | None) -> dict[str, Any]:
    """A result without fields that depend on time or number of processes."""
    assert result is not None
    return {name: value for name, value in result.items() if name not in ("speed", "run", "date", "code_version")}


# ---------------------------------------------------------------- prompts


def prompts(protocol: Protocol, group: str, tmp_path: Path, **options: Any) -> Any:
    given: dict[str, Any] = {"layout": None, "data": None, "excluded": frozenset(), **options}
    return read_prompts(protocol, group, cache=tmp_path, **given)


def changed(toy: Path, **changes: Any) -> Protocol:
    return Protocol.from_dict(yaml.safe_load(toy.read_text()) | changes)


def test_samples_are_chosen_by_seed_with_first_captions(toy: Path, tmp_path: Path) -> None:
    def keys(**changes: Any) -> list[str]:
        return [item.key for item in prompts(changed(toy, **changes), "train", tmp_path).samples]

    assert keys(samples=4) == keys(samples=4) != keys(samples=4, seed=1)
    assert keys(samples=4) == keys()[:4]
    assert len(keys()) == 6
    protocol = changed(toy, samples=5)
    found = prompts(protocol, "train", tmp_path)
    chosen = choose(protocol, "train", found, count=4)
    assert [key for key, _ in chosen.entries] == [item.key for item in found.samples[:4]]
    assert [caption for _, caption in chosen.entries] == [f"a {key}" for key, _ in chosen.entries]
    assert {item.concept for item in found.samples} <= {"traina", "trainb", "trainc"}


def test_impossible_group_raises_before_work(toy: Path, ask: Ask, tmp_path: Path, calls: list[list[str]]) -> None:
    def refused(message: str, **changes: Any) -> None:
        before = yaml.safe_load(toy.read_text())
        toy.write_text(json.dumps(before | changes))  # safe_dump would write repeated values as aliases
        with pytest.raises(ValueError, match=message):
            evaluate(ask(tmp_path / "out"))
        toy.write_text(yaml.safe_dump(before, sort_keys=False))

    refused(r"ks must be in 1\.\.17 \(the gallery\), got \[1, 18\]", metrics=[{"concept_accuracy": {"ks": [1, 18]}}])
    train = yaml.safe_load(toy.read_text())["groups"]["train"]
    refused(
        "6 keys are in more than one group, such as 'traina_blob'", groups={"train": train, "again": train}, targets=[]
    )
    styles = tmp_path / "data/val-styles"
    for path in styles.glob("val-styles[bc]_*"):
        path.unlink()
    refused("group val-styles: captions can't be shuffled across concepts")
    for path in styles.iterdir():
        path.rename(path.with_name(path.name.replace("_", "-")))
    refused("2 keys name no concept, such as 'val-stylesa-blob': expected <concept>_<style>", targets=[])
    assert not calls
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- codes


@pytest.fixture
def pipe(model: Path) -> DallePipeline:
    return DallePipeline.from_pretrained(model)


def test_codes_are_stored_by_digest_of_their_inputs(pipe: DallePipeline, tmp_path: Path) -> None:
    def folder(**changes: Any) -> Path | None:
        given = {"captions": ["a cat", "a dog"], "sampling": SamplingRule(candidates=2, chunk=2), **changes}
        return GeneratedImages(pipe, **given, cache=tmp_path).folder

    assert folder() == folder()
    others = [
        folder(seed=3), folder(captions=["a cat", "two"]), folder(every=True),
        folder(sampling=SamplingRule(candidates=2, chunk=2, temperature=0.5)),
    ]  # fmt: skip
    assert len({folder(), *others}) == 5


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("seeds", ["prompt", "chunk"])
def test_stored_codes_give_the_same_images(
    pipe: DallePipeline, tmp_path: Path, calls: list[list[str]], every: bool, seeds: Any
) -> None:
    sampling = SamplingRule(candidates=3, curve=(1, 2), chunk=2, seeds=seeds)
    captions = ["a cat", "a dog", "two birds"]
    fresh = GeneratedImages(pipe, captions, sampling, every=every)
    stored = GeneratedImages(pipe, captions, sampling, every=every, cache=tmp_path)
    for source in (stored, stored, fresh):
        for chunk in (range(2), range(2, 3)):
            batch, again = fresh.load(chunk), source.load(chunk)
            assert batch.chosen == again.chosen
            assert all(
                torch.equal(a, b) for n in batch.images for a, b in zip(batch.images[n], again.images[n], strict=True)
            )
    calls.clear()
    one = stored.load([1])  # out of the middle of a chunk
    assert not calls
    assert torch.equal(one.images[3][0], stored.load(range(2)).images[3][1])


def test_claimed_chunks_are_awaited(pipe: DallePipeline, tmp_path: Path) -> None:
    class Means:
        name = "means"
        record: dict[str, str] = {"sha256": "0"}  # noqa: RUF012

        def prepare(self, images: torch.Tensor) -> torch.Tensor:
            return images

        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": images.float().mean((2, 3))}

    source = GeneratedImages(pipe, ["a", "b", "c", "d"], SamplingRule(candidates=2, chunk=2), every=True)
    store = FeatureStore(source, {"means": Means()}, (0,), 2, tmp_path)
    claim = store.path("means", 1).with_suffix(".claim")
    claim.parent.mkdir(parents=True)
    with Claims() as other:
        assert other.take(claim, wait=False)
        store.run(Share(rank=1, world=2), label="second")  # begins with that chunk alone
        assert not store.path("means", 1).exists()
        first = threading.Thread(target=store.run, args=(Share(rank=0, world=2),), kwargs={"label": "first"})
        first.start()
        first.join(0.5)
        assert first.is_alive()
        other.release(claim)
    first.join(60)
    assert store.all("means", "0/0/features").shape == (4, 2, 3)  # of all candidates
    assert store.all("means", "0/2/features").shape == (4, 3)


# ---------------------------------------------------------------- results


def test_result_has_all_scores_and_records(ask: Ask, tmp_path: Path, calls: list[list[str]]) -> None:
    out = tmp_path / "a" / "r.json"
    result = evaluate(ask(out))
    assert result is not None
    assert json.loads(out.read_text()) == result
    assert result["left_out"] == []
    assert list(result["source"]["weights_sha256"]) == [
        "dvae/model.safetensors", "prior/model.safetensors", "ranker/model.safetensors"
    ]  # fmt: skip
    for name, captions in (("train", 4), ("val-styles", 6), ("val-concepts", 6)):
        group = result["groups"][name]
        assert (group["samples"], group["captions"]) == (6, captions)
        # An untrained prior is uniform over its 8 codes for any caption.
        assert values(result, "bits_per_token", name) == pytest.approx(
            dict.fromkeys(("right", "shuffled", "none"), 3.0)
        )
        rows = [r for r in result["scores"] if (r["metric"], r["group"]) == ("concept_accuracy", name)]
        assert {r["images"] for r in rows} == SETS
        assert {(r["samples"], r["reference_samples"]) for r in rows} == {(captions, 18)}  # pairs; all groups
        assert values(result, "retrieval", name).keys() >= {"image_to_text_top1", "text_to_image_top5"}
        distances = [r for r in result["scores"] if (r["metric"], r["group"]) == ("frechet", name)]
        assert all(r["rank_deficient"] for r in distances)  # six images are too few for eight features
        assert [r["samples"] for r in distances] == [6, captions, captions]
        with Image.open(tmp_path / f"a/r/samples-{name}.png") as sheet:
            assert sheet.width > 100
    # For noise, no real image has its concept among its neighbors, so the maximum is 0.
    assert values(result, "concept_accuracy", "train", "real")["top5"] == 0
    assert [target["name"].partition(",")[0] for target in result["targets"]] == ["bits"]
    assert {path.name for path in (tmp_path / "a/r").iterdir()} == {
        "report.md", "report.html", "run.json", "bits-per-token.png", "concept-accuracy-top1.png",
        "concept-accuracy-top5.png", *(f"samples-{group}.png" for group in result["groups"]),
        *(f"captions-{group}.jsonl" for group in result["groups"]),
    }  # fmt: skip

    # Another seed samples again, the same seed does not.
    assert [len(captions) for captions in calls] == [2] * 8  # 2 + 3 + 3 chunks
    evaluate(ask(tmp_path / "a" / "s.json", networks={}))
    assert len(calls) == 8
    evaluate(ask(tmp_path / "a" / "t.json", networks={}, changes={"seed": 1}))
    assert len(calls) == 16


def test_scores_of_single_candidate_equal_generated_images(ask: Ask, toy: Path, tmp_path: Path) -> None:
    toy.write_text(toy.read_text().replace("candidates: 3", "candidates: 1"))
    result = evaluate(ask(tmp_path / "r.json"))
    for group in ("train", "val-styles"):
        one = values(result, "concept_accuracy", group, "candidates")
        assert one == values(result, "concept_accuracy", group, "generated")
        distances = [values(result, "frechet", group, images) for images in ("candidates", "generated")]
        assert distances[0] == pytest.approx(distances[1])


def test_interrupted_and_shared_runs_equal_an_uninterrupted_run(
    ask: Ask, tmp_path: Path, calls: list[list[str]]
) -> None:
    alone = lasting(evaluate(ask(tmp_path / "alone/r.json")))
    calls[:] = [["kill"]]
    out = tmp_path / "killed/r.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(ask(out))
    assert not out.exists()
    assert lasting(evaluate(ask(out))) == alone
    assert len(calls) == 1 + 8 + 1  # one of them twice

    calls.clear()
    out = tmp_path / "shared/r.json"
    assert evaluate(ask(out, share=Share(rank=1, world=3))) is None
    assert len(calls) == 3  # chunk 1 of each group
    assert not out.exists()
    assert lasting(evaluate(ask(out, share=Share(rank=0, world=3)))) == alone
    assert len(calls) == 8
    # A late process finds its share complete and the result written.
    assert evaluate(ask(out, share=Share(rank=2, world=3))) is None
    assert len(calls) == 8


@pytest.mark.parametrize(
    ("writer", "after"),
    [
        pytest.param(writer, after, marks=[] if default else pytest.mark.slow, id=f"{moment}-{writer}")
        for writer in ("save_png", "write_report_of", "write_json")
        for after, moment in ((False, "before"), (True, "after"))
        for default in [(writer, after) == ("write_json", False)]  # the others take a minute
    ],
)
def test_run_killed_while_writing_is_continued(
    writer: str, after: bool, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "r.json", getattr(runner, writer)

    def killed(*arguments: Any, **options: Any) -> None:
        if after:
            write(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, writer, killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(ask(out))
    assert out.exists() == ((writer, after) == ("write_json", True))  # the result file is written last
    result = evaluate(ask(out))
    assert json.loads(out.read_text()) == result
    report = (tmp_path / "r/report.md").read_bytes()
    assert write_report([out], tmp_path / "again")[0].name == "report.md"
    assert (tmp_path / "r/report.md").read_bytes() == report


def test_damaged_chunk_of_codes_raises_with_its_name(ask: Ask, tmp_path: Path) -> None:
    evaluate(ask(tmp_path / "r.json", networks={}))
    chunk = sorted((tmp_path / ".cache").glob("codes-*/*.safetensors"))[0]
    chunk.write_bytes(b"torn")
    with pytest.raises(ValueError, match=f"{chunk.name} cannot be read .*: delete it and run again"):
        evaluate(ask(tmp_path / "s.json"))  # which needs them for another extractor


def test_missing_extractor_and_ranker_are_reported(ask: Ask, model: Path, mobilenet: Path, tmp_path: Path) -> None:
    pipe = DallePipeline.from_pretrained(model)
    bare = str(DallePipeline(pipe.image_tokenizer, pipe.prior, pipe.tokenizer).save_pretrained(tmp_path / "bare"))
    result = evaluate(ask(tmp_path / "r.json", model=bare, networks={}))
    assert result is not None
    assert {
        "retrieval, frechet: the model has no ranker", "concept_accuracy: no mobilenet was given"
    } <= {*result["left_out"]}  # fmt: skip
    assert {row["metric"] for row in result["scores"]} == {"psnr", "codebook_use", "bits_per_token"}
    text = (tmp_path / "r/report.md").read_text()
    assert "- left out: concept\\_accuracy: no mobilenet was given" in text
    assert "## Concept accuracy" not in text
    assert "## Retrieval" not in text

    # Without a ranker, all candidates are evaluated, but none is chosen.
    result = evaluate(ask(tmp_path / "s.json", model=bare))
    assert result is not None
    rows = [row for row in result["scores"] if row["metric"] == "concept_accuracy"]
    assert {row["images"] for row in rows} == SETS - {"generated"}
    assert any("the model has no ranker to choose among candidates" in line for line in result["left_out"])
    assert [target["name"].partition(",")[0] for target in result["targets"]] == ["bits"]
    assert (tmp_path / "s/concept-accuracy-top1.png").is_file()


def test_wrong_requests_raise_before_work(ask: Ask, toy: Path, tmp_path: Path, calls: list[list[str]]) -> None:
    (tmp_path / "r.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"r\.json already exists: .*--overwrite"):
        evaluate(ask(tmp_path / "r.json"))
    assert (tmp_path / "r.json").read_text() == "mine"
    with pytest.raises(ValueError, match="temperature must be a finite number of at least 0"):
        evaluate(ask(tmp_path / "s.json", changes={"temperature": -1.0}))
    toy.write_text(toy.read_text().replace("optional: true", f"optional: true\n    sha256: {'ab' * 32}", 1))
    with pytest.raises(ValueError, match=r"has sha256 \w+, expected (ab)+"):
        evaluate(ask(tmp_path / "s.json"))
    assert not calls


def test_command_evaluates_and_prints_report(
    toy: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    options = ["--train-captions", "2", "--val-captions", "4", "--candidates", "2", "--temperature", "0.5"]
    command = ["eval", str(toy), "--model", str(model), "--out", str(out)]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().out
    assert "left out: concept_accuracy: no mobilenet was given" in said
    assert f"report: {tmp_path / 'r/report.html'}" in said
    assert "| samples | 6 | 6 | 6 |" in said
    assert "| 1.000 | not the protocol's numbers |" not in said.partition("## Samples")[2]
    result = json.loads(out.read_text())
    protocol = result["protocol"]
    assert (protocol["sampling"]["candidates"], protocol["sampling"]["temperature"], protocol["seed"]) == (2, 0.5, 0)
    assert [group["captions"] for group in result["groups"].values()] == [2, 4, 4]
    assert main([*command, "--overwrite", "--device", "nonsense"]) == 2
    assert "device 'nonsense' cannot be used" in capsys.readouterr().err
    assert main(command) == 2
    assert "holds another evaluation" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert json.loads(out.read_text())["protocol"]["sampling"]["candidates"] == 3


# ---------------------------------------------------------------- distances


def test_distances_equal_direct_computation(ask: Ask, toy: Path, make: Any, tmp_path: Path) -> None:
    """Reconstructions and generated images differ from noise, and a set does not differ from itself."""
    given = yaml.safe_load(toy.read_text())
    frechet = {"frechet": {"extractor": "ranker", "images": ["real", "reconstructed"], "interval": False}}
    toy.write_text(yaml.safe_dump(given | {"metrics": [frechet], "targets": [], "extractors": {}}, sort_keys=False))
    result = evaluate(ask(tmp_path / "r.json", networks={}))
    assert values(result, "frechet", "train", "real")["value"] == pytest.approx(0, abs=1e-9)
    assert values(result, "frechet", "train", "reconstructed")["value"] > 1e-3


def test_targets_divide_and_subtract(toy: Path) -> None:
    def score(metric: str, part: str, images: str, value: float) -> dict[str, Any]:
        return {
            "metric": metric, "part": part, "images": images, "value": value, "samples": 4, "group": "train"
        }  # fmt: skip

    protocol = find_protocol(toy)
    accuracy = [score("concept_accuracy", "top5", images, v) for images, v in (("real", 0.8), ("generated", 0.6))]
    bits = [score("bits_per_token", part, "real", v) for part, v in (("right", 3.0), ("shuffled", 3.5))]
    for row in bits:
        row["group"] = "val-styles"
    got = runner.targets(protocol, {"scores": [*accuracy, *bits]})
    assert [(row["reached"], row["met"]) for row in got] == [(pytest.approx(0.75), False), (0.5, True)]
    blind = [row | {"value": 0.0} for row in accuracy]
    assert [row["reached"] for row in runner.targets(protocol, {"scores": [*blind, *bits]})] == [0.5]
    assert runner.targets(protocol, {"scores": []}) == []
