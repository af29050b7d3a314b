"""The protocol from end to end on a toy model: complete, resumable, honest about what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dalle_zoo_eval import emoji64
from dalle_zoo_eval.command import main
from dalle_zoo_eval.emoji64 import Protocol, Split, evaluate_emoji64, load_split, targets
from dalle_zoo_eval.evaluator import WEIGHTS_FILE, MobileNet
from PIL import Image
from safetensors.torch import save_file

from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.registry import UnknownNameError

PROTOCOL = Protocol(samples=6, train_captions=4, val_captions=6, candidates=3)


def toy_split(name: str, size: int) -> Split:
    """Six samples of three concepts in two styles."""
    draw = torch.Generator().manual_seed(len(name))
    keys = [f"{name}{concept}_{style}" for concept in "abc" for style in ("flat", "blob")]
    images = torch.randint(0, 256, (6, 3, size, size), generator=draw, dtype=torch.uint8)
    return Split(name, keys, [f"a {key}" for key in keys], images)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji64, "load_split", toy_split)
    monkeypatch.setattr(emoji64, "CHUNK", 2)


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("evaluator")
    save_file(MobileNet().state_dict(), folder / WEIGHTS_FILE)
    return str(folder)


def stable(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "date"}


def test_a_result_holds_everything_and_a_killed_run_reaches_the_same(
    model: Path, evaluator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_emoji64(str(model), evaluator, tmp_path / "a" / "r.json", protocol=PROTOCOL)
    assert json.loads((tmp_path / "a" / "r.json").read_text()) == whole
    assert whole["left_out"] == []
    assert whole["evaluator"]["pixels"] == 128
    assert set(whole["model"]["weights_sha256"]) == {
        "dvae/model.safetensors", "prior/model.safetensors", "ranker/model.safetensors"
    }  # fmt: skip
    for name, captions in (("train", 4), ("val-styles", 6), ("val-concepts", 6)):
        figures = whole["splits"][name]
        assert (figures["samples"], figures["captions"]) == (6, captions)
        # An untrained prior is uniform over its 8 codes, whatever the caption.
        assert figures["bits"] == pytest.approx(dict.fromkeys(("right", "shuffled", "none"), 3.0))
        kinds = {"real", "reconstructed", "one", "best", "shuffled"}
        assert set(figures["concept_accuracy"]) == kinds
        assert figures["retrieval"].keys() >= {"image_to_text_top1", "text_to_image_top5"}
        assert figures["ranker_distance"] == {}  # six pictures are too few for eight features
        with Image.open(tmp_path / "a" / f"r-{name}.png") as sheet:
            assert sheet.width > 100

    # Killed at the fifth call: what was drawn before is not drawn again, and the numbers agree.
    calls: list[int] = []
    draw = DallePipeline.__call__

    def dying(self: DallePipeline, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(DallePipeline, "__call__", dying)
    out = tmp_path / "b" / "r.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_emoji64(str(model), evaluator, out, protocol=PROTOCOL)
    assert [path.name for path in out.parent.iterdir()] == [".cache"]
    again = evaluate_emoji64(str(model), evaluator, out, protocol=PROTOCOL)
    assert stable(again) == stable(whole)
    assert len(calls) == 8 + 1  # 2 + 3 + 3 chunks, one of them twice

    # Another seed is drawn anew.
    evaluate_emoji64(str(model), None, tmp_path / "b" / "s.json", protocol=Protocol(seed=1, samples=6))
    assert len(calls) > 9 + 7


def test_without_evaluator_and_ranker_it_says_so(model: Path, tmp_path: Path) -> None:
    pipe = DallePipeline.from_pretrained(model)
    bare = DallePipeline(pipe.image_tokenizer, pipe.prior, pipe.tokenizer)
    bare.save_pretrained(tmp_path / "bare")
    out = tmp_path / "r.json"
    result = evaluate_emoji64(str(tmp_path / "bare"), None, out, protocol=PROTOCOL)
    assert [line.split(":")[0] for line in result["left_out"]] == [
        "concept accuracy",
        "retrieval and best candidate",
    ]
    assert "concept_accuracy" not in result["splits"]["train"]
    assert result["evaluator"] is None


@pytest.mark.parametrize("name", ["r.json", "r-val-styles.png"])
def test_nothing_is_overwritten(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name}: already there; .*--overwrite"):
        evaluate_emoji64(str(model), None, tmp_path / "r.json", protocol=PROTOCOL)
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_command_writes_the_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    options = ["--train-captions", "2", "--val-captions", "2", "--candidates", "2"]
    main(["emoji64", "--model", str(model), "--out", str(out), *options])
    assert json.loads(out.read_text())["protocol"]["candidates"] == 2
    assert "left out: concept accuracy" in capsys.readouterr().out


def test_a_wrong_protocol_is_answered_with_the_right_one() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'emoji64'"):
        main(["emoji46"])


def test_distances_in_the_rankers_features(model: Path) -> None:
    ranker = DallePipeline.from_pretrained(model).ranker
    assert ranker is not None
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split("train", [str(i) for i in range(40)], ["a"] * 40, images)
    seen = emoji64.ranker_sees(ranker, images)
    grey = emoji64.ranker_sees(ranker, torch.full_like(images, 128))
    drawn = emoji64.Drawn(
        best=torch.zeros(40, dtype=torch.long), shown=images, features=None,
        ranker_features=torch.stack([seen, grey], 1),
    )  # fmt: skip
    found = emoji64.ranker_distances(ranker, split, images, drawn)
    assert found["best"] == pytest.approx(0, abs=1e-9)
    assert found["reconstructed"] == pytest.approx(0, abs=1e-9)
    assert found["one"] > 1e-3  # the mean of that and of grey pictures


def test_targets_compare_with_the_ceiling() -> None:
    def accuracy(best: float) -> dict[str, Any]:
        return {"real": {"top5": 0.8}, "best": {"top5": best}}

    figures = {
        "train": {"concept_accuracy": accuracy(0.6)},
        "val-styles": {
            "concept_accuracy": accuracy(0.6),
            "bits": {"right": 3.0, "shuffled": 3.5, "none": 3.2},
        },
    }
    got = [(round(t["reached"], 6), t["met"]) for t in targets(figures)]
    assert got == [(0.75, False), (0.75, True), (0.5, True)]


def test_samples_are_drawn_by_seed_and_keep_their_parts_together() -> None:
    split = toy_split("train", 4)
    drawn = split.draw(4, seed=0)
    assert drawn.keys == split.draw(4, seed=0).keys != split.draw(4, seed=1).keys
    for key, caption, image in zip(drawn.keys, drawn.captions, drawn.images, strict=True):
        place = split.keys.index(key)
        assert caption == split.captions[place]
        assert torch.equal(image, split.images[place])


def test_the_bundled_splits_load() -> None:
    split = load_split("val-styles", 64)
    assert len(split.keys) == len(set(split.keys)) == 413
    assert split.images.shape == (413, 3, 64, 64)
    assert split.keys[0] == "267b_fluent-flat"
    assert split.concepts[0] == "267b"


def test_impossible_protocols_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        Protocol(candidates=0)
