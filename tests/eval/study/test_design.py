"""Making a study: inputs, images, pairs, and what each rater sees."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval.study.design import Pair, Study, plan_raters
from dalle_zoo_eval.study.errors import StudyError
from dalle_zoo_eval.study.make import Plan
from dalle_zoo_eval.study.questions import PAPER, read_questions
from dalle_zoo_eval.study.sources import read_captions, read_system
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.eval.study.conftest import shown_order


def pairs_of(count: int, controls: int = 0) -> list[Pair]:
    real = [Pair(caption=n, images=(f"{n}a", f"{n}b"), systems=(0, 1)) for n in range(count)]
    return real + [Pair(caption=n, images=(f"{n}a", f"{n}c"), systems=(0, None)) for n in range(controls)]


def test_each_pair_has_one_rater_per_vote_and_balanced_sides() -> None:
    raters = plan_raters(pairs_of(20, controls=2), seed=3, votes=4, per_rater=6)
    assert len(raters) == 4 * 4  # 20 pairs in sheets of at most 6 are 4 sheets
    assert max(len(rater.order) for rater in raters) <= 6 + 2
    seen = Counter(pair for rater in raters for pair in rater.order)
    assert seen == Counter(dict.fromkeys(range(20), 4) | dict.fromkeys((20, 21), 16))
    left = Counter(p for rater in raters for p, flip in zip(rater.order, rater.flipped, strict=True) if flip)
    assert [left[n] for n in range(20)] == [2] * 20
    assert (
        len({rater.flipped[rater.order.index(n)] for n in range(20) for rater in raters[:4] if n in rater.order}) == 2
    )
    assert len({rater.order for rater in raters}) == 16


def test_plan_depends_on_seed_but_codes_are_secret() -> None:
    one, again, other = (plan_raters(pairs_of(9), seed=seed, votes=2) for seed in (0, 0, 1))
    assert [(r.order, r.flipped) for r in one] == [(r.order, r.flipped) for r in again]
    assert [r.order for r in one] != [r.order for r in other]
    assert len({r.code for r in (*one, *again)}) == 4
    assert len(plan_raters(pairs_of(9), seed=0, votes=2, spare=3)) == 5


def test_study_round_trips_and_raises_after_change(made: Any, tmp_path: Path) -> None:
    study = made(names=("a", "b", "c"), controls=2)
    assert Study.read(tmp_path / "study") == study
    assert Counter(pair.systems[0] is None or pair.systems[1] is None for pair in study.pairs) == {False: 9, True: 2}
    assert len(shown_order(study, 0)) == 11
    file = tmp_path / "study/study.json"
    values = json.loads(file.read_text())
    values["pairs"][0]["systems"].reverse()
    file.write_text(json.dumps(values))
    with pytest.raises(StudyError, match="was changed"):
        Study.read(tmp_path / "study")
    values["votes"] = {}
    del values["raters"][0]["code"]
    file.write_text(json.dumps(values))
    with pytest.raises(StudyError, match="make the study again"):
        Study.read(tmp_path / "study")


def test_images_of_the_page_have_no_metadata_and_controls_keep_their_pixels(made: Any, tmp_path: Path) -> None:
    study = made(controls=1)
    (control,) = (pair for pair in study.pairs if pair.is_control)
    paths = [tmp_path / "study/page/images" / name for name in control.images]
    pixels = [sorted(Image.open(path).getcolors(2**24) or []) for path in paths]
    assert pixels[0] == pixels[1]
    assert Image.open(paths[0]).tobytes() != Image.open(paths[1]).tobytes()
    assert "study.json" not in {path.name for path in (tmp_path / "study/page").rglob("*")}


def test_metadata_is_removed(tmp_path: Path, made: Any) -> None:
    marks = PngInfo()
    marks.add_text("prompt", "secret of the system")
    study = made(controls=0)
    assert study.pairs
    source = tmp_path / "ours/0.png"
    Image.open(source).save(source, pnginfo=marks)
    from dalle_zoo_eval.study.make import make_study

    plan = Plan(systems=(("A", tmp_path / "ours"), ("B", tmp_path / "theirs")), captions=tmp_path / "captions.txt")
    make_study(plan, tmp_path / "other")
    assert b"secret" in source.read_bytes()
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "other/page/images").iterdir())


# ---------------------------------------------------------------- inputs


def white(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "white").save(path)
    return path


def test_manifest_gives_first_image_of_each_row(tmp_path: Path) -> None:
    names = ["a0.png", "a1.png", "b0.png", "c0.png"]
    rows = [("0", "a cat"), ("0", "a cat"), ("1", "a  dog"), ("2", "a cat")]
    lines = [{"id": i, "prompt": p, "image_path": n} for n, (i, p) in zip(names, rows, strict=True)]
    files = [white(tmp_path / "m" / name) for name in names]
    (tmp_path / "m/manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for place in ("m", "m/manifest.jsonl"):
        system = read_system(tmp_path / place, "m", ["a cat", "a dog", "a cat"])
        assert system.images == (files[0], files[2], files[3])  # a repeated caption has the next of its images
    with pytest.raises(StudyError, match="no image for 1 of 2 captions, such as 'a bird'"):
        read_system(tmp_path / "m", "m", ["a cat", "a bird"])
    files[3].unlink()
    with pytest.raises(StudyError, match=r"images that do not exist, such as .*c0\.png"):
        read_system(tmp_path / "m", "m", ["a cat"])


def test_images_without_captions_are_ordered_by_number(tmp_path: Path) -> None:
    files = [white(tmp_path / "f" / f"image{n}.png") for n in (1, 2, 10)]
    assert read_system(tmp_path / "f", "f", ["x", "y", "z"]).images == tuple(files)
    with pytest.raises(StudyError, match="3 images for 2 captions"):
        read_system(tmp_path / "f", "f", ["x", "y"])


def test_images_with_text_files_match_their_captions(tmp_path: Path) -> None:
    for name in ("one", "two"):
        white(tmp_path / "f" / f"{name}.png")
        (tmp_path / "f" / f"{name}.txt").write_text(f"the caption {name}")
    images = read_system(tmp_path / "f", "f", ["the caption two", "the caption one"]).images
    assert [image.stem for image in images] == ["two", "one"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "must contain a JSON object"),
        ('{"prompt": 3, "image_path": "a.png"}', "prompt must be text, got 3"),
        ('{"prompt": "x", "image_path": "../a.png"}', "path inside the folder"),
        ("{", "line 1 is not valid JSON"),
    ],
)
def test_wrong_manifest_raises(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(StudyError, match=problem):
        read_system(tmp_path, "m", ["x"])


def test_captions_are_lines_or_prompts(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a cat \n\n a  dog\n")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a cat", "id": "1"}\n{"prompt": "a dog"}\n')
    assert read_captions(tmp_path / "c.txt") == read_captions(tmp_path / "c.jsonl") == ["a cat", "a dog"]
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(StudyError, match="has no captions"):
        read_captions(tmp_path / "c.txt")
    with pytest.raises(StudyError, match="cannot be read: No such file"):
        read_captions(tmp_path / "none.txt")


def test_questions_are_read_from_file(tmp_path: Path) -> None:
    assert read_questions(None) == PAPER
    path = tmp_path / "q.yaml"
    path.write_text('questions:\n- {id: realism, text: "Which one?", neither: true}\n')
    assert [(q.id, q.neither) for q in read_questions(path)] == [("realism", True)]
    for text, problem in {
        "questions: []": "expected 1 to 8 questions, got 0",
        "questions: [{id: A b, text: x}]": "id must be of lowercase letters",
        "questions: [{id: a, text: x}, {id: a, text: y}]": "the id a is repeated",
        "questions: [{id: a, txt: x}]": "Did you mean 'text'",
        "questions: [{id: a, text: x, neither: 1}]": "neither must be true or false",
    }.items():
        path.write_text(text)
        with pytest.raises(StudyError, match=problem):
            read_questions(path)


def test_too_large_study_raises(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_zoo_eval.study.make.MAX_BYTES", 1000)
    with pytest.raises(StudyError, match="choose fewer captions with --num-captions"):
        made()
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"votes": 0}, "--votes must be at least 1, got 0"),
        ({"num_captions": 4}, "--num-captions 4 is more than the 3 captions"),
        ({"names": ("one",)}, "at least 2 systems, got 1"),
    ],
)
def test_wrong_options_raise_before_writing(made: Any, tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(StudyError, match=problem):
        made(**options)
    assert not (tmp_path / "study").exists()


def test_damaged_image_raises_and_leaves_no_folder(made: Any, tmp_path: Path, monkeypatch: Any) -> None:
    made(controls=0)
    (tmp_path / "ours/1.png").write_bytes(b"no image")
    from dalle_zoo_eval.study.make import make_study

    plan = Plan(systems=(("A", tmp_path / "ours"), ("B", tmp_path / "theirs")), captions=tmp_path / "captions.txt")
    with pytest.raises(StudyError, match=r"ours/1\.png: not a readable image"):
        make_study(plan, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_prompts_with_line_separators_stay_whole(tmp_path: Path) -> None:
    prompt = "a\u2028b\x85c"
    (tmp_path / "a.png").touch()
    (tmp_path / "manifest.jsonl").write_text(
        json.dumps({"id": "0", "prompt": prompt, "image_path": "a.png"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (captions,) = read_captions(tmp_path / "manifest.jsonl")
    assert captions == "a b c"
    (tmp_path / "captions.txt").write_text(f"{prompt}\n", encoding="utf-8")
    assert read_captions(tmp_path / "captions.txt") == [captions]
    assert read_system(tmp_path, "x", [captions]).images == (tmp_path / "a.png",)


@pytest.mark.parametrize("options", [{"votes": 10**9}, {"spare": 10**9}, {"title": "caf\udce9"}])
def test_what_no_study_can_hold_is_refused_at_once(made: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match=r"the study needs \d+ raters, more than 10000|not valid Unicode: choose"):
        made(**options)
    assert not (tmp_path / "study").exists()
