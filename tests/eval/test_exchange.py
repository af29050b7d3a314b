"""Images in the layouts of other benchmarks, and their result files in our reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.exchange.command import main as main_of_benchmark
from dalle_zoo_eval.exchange.imports import import_result
from dalle_zoo_eval.exchange.layouts import export_layout, images_by_prompt

from dalle_zoo.cli.main import main
from dalle_zoo.results import ResultError, scores_of

PROMPTS = {"two red cats": 2, "a dog on a car": 1}


@pytest.fixture
def manifest(make: Any, tmp_path: Path) -> Path:
    """Manifest of three images of two prompts."""
    lines = []
    for id_, (prompt, count) in enumerate(PROMPTS.items()):
        for k in range(count):
            path = make.image(tmp_path / f"images/{id_}-{k}.png", seed=10 * id_ + k)
            lines.append({"id": id_, "image_path": path.name, "prompt": prompt, "seed": 7})
    path = tmp_path / "images/manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def geneval(tmp_path: Path) -> Path:
    """Prompts in the form of GenEval 2."""
    skills = (["count", "attribute", "object"], ["object", "position"])
    rows = [{"prompt": prompt, "skills": own} for prompt, own in zip(PROMPTS, skills, strict=True)]
    path = tmp_path / "geneval2_data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_layouts_have_every_image_under_its_prompt(manifest: Path, geneval: Path, tmp_path: Path) -> None:
    assert export_layout("geneval2", manifest, tmp_path / "paths.json", geneval) == 2
    paths = json.loads((tmp_path / "paths.json").read_text())
    assert paths == {prompt: str(files[0].resolve()) for prompt, files in images_by_prompt(manifest).items()}
    assert export_layout("t2i-compbench", manifest.parent, tmp_path / "comp") == 3
    names = sorted((tmp_path / "comp/samples").iterdir(), key=lambda path: int(path.stem.rpartition("_")[2]))
    assert [path.stem.partition("_")[0] for path in names] == ["two red cats", "two red cats", "a dog on a car"]
    assert export_layout("evalscope", manifest, tmp_path / "es.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "es.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["two red cats", "two red cats", "a dog on a car"]
    assert all(Path(row["image_path"]).is_file() for row in rows)


def test_what_does_not_fit_is_refused(make: Any, manifest: Path, tmp_path: Path) -> None:
    make.text(tmp_path / "more.txt", *PROMPTS, "a third prompt")
    with pytest.raises(ValueError, match=r"no image for 1 of 3 prompts of .*, such as 'a third prompt'"):
        export_layout("evalscope", manifest, tmp_path / "es.jsonl", tmp_path / "more.txt")
    make.text(make.image(tmp_path / "odd/x.png").with_suffix(".txt"), "a_b")
    with pytest.raises(ValueError, match="'a_b' cannot be the name"):
        export_layout("t2i-compbench", tmp_path / "odd", tmp_path / "comp")
    (tmp_path / "bad.json").write_text("[[2.0], [0.5]]")
    with pytest.raises(ResultError, match="lists of scores from 0 to 1"):
        import_result("geneval2", tmp_path / "bad.json", name="x", prompts=manifest)
    (tmp_path / "lines.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 1 must contain a JSON object, got list"):
        import_result("geneval2", tmp_path / "bad.json", name="x", prompts=tmp_path / "lines.jsonl")
    (tmp_path / "odd.json").write_text('{"metrics": [1]}')
    with pytest.raises(ResultError, match="expected a report of EvalScope with metrics"):
        import_result("evalscope", tmp_path / "odd.json", name="x")
    with pytest.raises(ResultError, match="--name must be the name"):
        import_result("evalscope", tmp_path / "odd.json", name="")
    with pytest.raises(FileExistsError, match=r"is not empty: choose another --out"):
        main_of_benchmark(["export", "t2i-compbench", str(manifest), "--out", str(tmp_path / "odd")])
    with pytest.raises(ResultError, match="give their file with --prompts"):
        import_result("geneval2", tmp_path / "bad.json", name="x")


def test_results_of_geneval_come_into_a_report(
    geneval: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Means by prompt, as soft_tifa_am and soft_tifa_gm of its code."""
    (tmp_path / "score_lists.json").write_text("[[1.0, 0.25, 0.5], [0.9, 0.4]]")
    out = tmp_path / "r.json"
    options = ["--prompts", str(geneval), "--name", "mine", "--out", str(out)]
    assert main(["benchmark", "import", "geneval2", str(tmp_path / "score_lists.json"), *options]) == 0
    assert "Soft-TIFA, geometric mean, %" in capsys.readouterr().out
    found = {score.part: score.value for score in scores_of(json.loads(out.read_text()))}
    assert found["mean"] == pytest.approx((1.75 / 3 + 0.65) / 2)
    assert found["geometric mean"] == pytest.approx((0.125 ** (1 / 3) + 0.6) / 2)
    assert found["skill object"] == pytest.approx(0.7)
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "mine" in (tmp_path / "report/report.md").read_text()


def test_results_of_compbench_and_evalscope(make: Any, tmp_path: Path) -> None:
    make.text(tmp_path / "color_val.txt", "a red cat", "a blue dog")
    answers = [{"question_id": n, "answer": f"{value}"} for n, value in enumerate((1.0, 0.5, 0.25, 0.25))]
    (tmp_path / "vqa_result.json").write_text(json.dumps(answers))
    result = import_result(
        "t2i-compbench", tmp_path / "vqa_result.json", name="x", prompts=tmp_path / "color_val.txt", part="color"
    )
    (score,) = scores_of(result)
    assert (score.value, score.part, score.samples, score.interval) == (0.5, "color", 4, [0.25, 0.75])
    for metric in ({"name": "PickScore"}, {"identity": {"name": "PickScore", "aggregation": "mean"}}):
        (tmp_path / "es.json").write_text(json.dumps({"metrics": [{**metric, "num": 4, "score": 21.5}]}))
        (score,) = scores_of(import_result("evalscope", tmp_path / "es.json", name="x"))
        assert (score.part, score.value, score.samples) == ("PickScore", 21.5, 4)
