"""The protocol of composed scenes: metrics of known images, and a small evaluation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dalle_zoo_eval.caption_lists import write_captions
from dalle_zoo_eval.data_files import bundled_folder
from dalle_zoo_eval.datasets import DatasetError, EvalDataset, UnavailableGroupError, read_dataset
from dalle_zoo_eval.datasets.composition import HELD_OUT, SPLITS, read_prompts, sprite_set
from dalle_zoo_eval.datasets.images import load_image
from dalle_zoo_eval.extractors import EXTRACTORS, Extractor, ExtractorFileError, load_extractor
from dalle_zoo_eval.extractors.sprites import SpritesExtractor
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.metrics.composition import composition
from dalle_zoo_eval.metrics.distinct_images import distinct_images
from dalle_zoo_eval.metrics.estimates import bootstrapped
from dalle_zoo_eval.metrics.seen_combinations import seen_combinations
from dalle_zoo_eval.protocol import Protocol, find_protocol
from dalle_zoo_eval.report import write_report
from dalle_zoo_eval.request import Request
from dalle_zoo_eval.runner import evaluate
from dalle_zoo_eval.sample_scores import CompositionScore
from dalle_zoo_eval.scene_pixels import cut_out
from PIL import Image, ImageDraw
from torch import Tensor

from dalle_zoo.cards import render_card
from dalle_zoo.composition import COMBINATIONS, Placed, Scene, is_held_out, render
from dalle_zoo.composition.colors import HUES
from dalle_zoo.files import read_json
from dalle_zoo.model_folder import SAMPLING
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.results import group_tables, read_result
from dalle_zoo.zoo import BUNDLED, DEFAULT_MODEL

RESULT = Path(__file__).parents[2] / "eval/results/composition.json"
CAPTIONS = Path(__file__).parents[2] / "eval/captions"
Polygon = Sequence[tuple[int, int]]
THINGS: dict[str, Polygon] = {
    "cat": ((8, 60), (8, 4), (24, 20), (40, 20), (56, 4), (56, 60)),
    "dog": ((4, 20), (60, 20), (60, 44), (4, 44)),
    "pizza": ((4, 8), (60, 8), (32, 60)),
    "rocket": ((32, 2), (44, 22), (44, 62), (20, 62), (20, 22)),
    "house": ((2, 32), (32, 2), (62, 32), (52, 32), (52, 62), (12, 62), (12, 32)),
    "tree": ((32, 2), (60, 44), (38, 44), (38, 62), (26, 62), (26, 44), (4, 44)),
    "star": ((32, 2), (40, 24), (62, 26), (44, 40), (52, 62), (32, 48), (12, 62), (20, 40), (2, 26), (24, 24)),
    "key": ((6, 6), (58, 6), (58, 22), (22, 22), (22, 58), (6, 58)),
}
"""Corners of the shapes that represent things."""
COLORS = {"flat": (0, 205, 200), "3d": (0, 150, 150)}
"""Far from the colors of all grounds."""


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_zoo_eval.datasets.composition.PROMPTS_OF_A_KIND", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sprite set of eight things in two styles: plain, and darker with an edge."""
    root = tmp_path_factory.mktemp("sprites")
    for style, color in COLORS.items():
        (root / style).mkdir()
        for name, corners in THINGS.items():
            image = Image.new("RGBA", (64, 64))
            pen = ImageDraw.Draw(image)
            pen.polygon(list(corners), fill=(*color, 255))
            if style == "3d":
                pen.line([*corners, corners[0]], fill=(120, 0, 60, 255), width=5)
            image.save(root / style / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def sprites(folder: Path) -> Extractor:
    return load_extractor("sprites", folder)


def measured(sprites: Extractor, dataset: EvalDataset) -> dict[str, Tensor]:
    """Outputs of the extractor for the images of a dataset, one image per prompt."""
    images = torch.stack([load_image(item, "center", None) for item in dataset.items])
    return {name: values[:, None] for name, values in sprites(images).items()}


def scored(found: dict[str, Tensor], targets: Sequence[Any]) -> dict[str, float]:
    names = ("grounds", "hues", "layout", "boxes", "things", "shapes", "styles")
    return {part: score.value for part, score in composition(*(found[n] for n in names), targets).items()}


@pytest.mark.parametrize("split", SPLITS)
def test_composites_score_1_for_their_captions_and_0_for_others(folder: Path, sprites: Extractor, split: str) -> None:
    dataset = read_dataset("composition", folder, split)
    found, targets = measured(sprites, dataset), [item.targets for item in dataset.items]
    right = scored(found, targets)
    assert right == dict.fromkeys(right, 1.0)
    concepts = [item.concept for item in dataset.items]
    others = [next(j for j, other in enumerate(concepts) if other != concept) for concept in concepts]
    assert scored(found, [targets[j] for j in others])["all"] == 0


@pytest.mark.parametrize("kind", HELD_OUT)
def test_held_out_combinations_are_distinguished_from_training(folder: Path, sprites: Extractor, kind: str) -> None:
    for split, share in ((kind, 0.0), (f"seen-{kind}", 1.0)):
        dataset = read_dataset("composition", folder, split)
        found = measured(sprites, dataset)["novel"]
        # A prompt for a blue thing in blue is no new combination.
        tested = [i for i, item in enumerate(dataset.items) if item.targets.get("hue") != "blue"]
        assert seen_combinations(found[tested], [dataset.items[i].targets for i in tested])["value"].value == share


def test_error_in_one_part_lowers_only_that_part(folder: Path, sprites: Extractor) -> None:
    dataset = read_dataset("composition", folder, "ground")
    found, first = measured(sprites, dataset), dataset.items[0].targets
    other = "red" if first["ground"] != "red" else "blue"
    targets = [dict(first, ground=other), *(item.targets for item in dataset.items[1:])]
    share = 1 - 1 / len(targets)
    assert scored(found, targets) == {"thing": 1.0, "color": pytest.approx(share), "all": pytest.approx(share)}


def test_small_and_empty_images_are_scored(sprites: Extractor) -> None:
    found = sprites(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8))
    assert (found["things"] == -1).all()
    assert found["grounds"][:, 0].tolist() == [1, 1]
    assert found["hues"].sum() == 0


def test_thing_that_fills_the_image_is_at_no_place(folder: Path, sprites: Extractor) -> None:
    dataset = read_dataset("composition", folder, "plain")
    targets = [dict(item.targets, place=(0.5, 0.5)) for item in dataset.items]
    assert scored(measured(sprites, dataset), targets) == {"thing": 1.0, "layout": 0.0, "all": 0.0}


def test_empty_images_have_no_hue(sprites: Extractor) -> None:
    found = sprites(torch.full((len(HUES), 3, 64, 64), 255, dtype=torch.uint8))
    by_prompt = {name: values[:, None] for name, values in found.items()}
    assert scored(by_prompt, [{"hue": name} for name in HUES]) == {"color": 0.0, "all": 0.0}


def test_things_in_their_own_hue_are_no_held_out_combination(folder: Path, sprites: Extractor) -> None:
    assert any(is_held_out("hue", name, "blue") for name in THINGS)
    known = sprite_set(folder)
    flat = [i for i, sprite in enumerate(known.sprites) if sprite.style == "flat"]
    scenes = (Scene(kind="single", items=(Placed(sprite=i),)) for i in flat)
    images = torch.stack([torch.from_numpy(render(scene, known)).permute(2, 0, 1) for scene in scenes])
    found = sprites(images)
    assert {list(HUES)[i] for i in found["hues"].argmax(1)} == {"blue"}
    assert not found["novel"][:, COMBINATIONS.index("hue")].any()


def test_styled_prompts_ask_for_their_style(folder: Path, sprites: Extractor) -> None:
    dataset = read_dataset("composition", folder, "styled")
    for item in dataset.items:
        assert item.captions[0].startswith(f"a {item.targets['styles']['all']} emoji of ")
    other = {"flat": "3d", "3d": "flat"}
    targets = [dict(item.targets, styles={"all": other[item.targets["styles"]["all"]]}) for item in dataset.items]
    assert scored(measured(sprites, dataset), targets) == {"thing": 1.0, "style": 0.0, "all": 0.0}


def test_cut_out_thing_does_not_depend_on_its_place() -> None:
    pixels = torch.full((2, 3, 64, 64), 255.0)
    pixels[0, :, 4:24, 10:30] = pixels[1, :, 40:60, 33:53] = 0
    crops, boxes = cut_out(pixels, (pixels[:, 0] == 0).float(), (0, 0, 64, 64))
    assert boxes.tolist() == [[10, 4, 30, 24], [33, 40, 53, 60]]
    assert torch.allclose(crops[0], crops[1], atol=1e-5)
    assert float(crops.mean()) > 0.95  # it fills its square


def test_repeated_images_count_once() -> None:
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(256, (3, 3, 16, 16), generator=generator).to(torch.uint8)
    noisy = (some[0].int() + 3).clamp(0, 255).to(torch.uint8)
    thumbnails = torch.stack([torch.stack([some[0], some[1], noisy, some[2]]), some[:1].expand(4, -1, -1, -1)])
    assert distinct_images(thumbnails)["value"].value == (3 + 1) / 2


def test_intervals_contain_the_mean_and_shrink_with_samples() -> None:
    few, many = (bootstrapped(torch.arange(n) % 2) for n in (10, 1000))
    assert few.low < few.value == 0.5 < few.high
    assert few.high - few.low > 5 * (many.high - many.low)


def test_prompt_list_matches_bundled_sprites() -> None:
    prompts = read_prompts()
    assert len(prompts) == len(set(prompts)) == 100
    index = Path(__file__).parents[2] / "dalle_zoo/_data/sprites64/sprites.jsonl"
    known = {
        name
        for record in map(json.loads, index.read_text("utf-8").splitlines())
        if record["split"] == "train" and record["style"] != "blob"
        for name in record["names"]
    }
    assert [p for p in prompts if p.split(" ", 1)[-1] not in known and p not in known] == []


def test_sprites_of_one_thing_raise(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64))
    image.paste((250, 0, 0, 255), (16, 16, 48, 48))
    image.save(tmp_path / "quux.png")
    with pytest.raises(UnavailableGroupError, match="are of 'quux', and prompts of two different things are needed"):
        read_dataset("composition", tmp_path, "plain")
    with pytest.raises(UnavailableGroupError, match="no sprite has a style"):
        read_dataset("composition", tmp_path, "styled")
    with pytest.raises(ExtractorFileError, match="expected f00"):
        load_extractor("sprites", tmp_path, expected_sha256="f00")


def test_plain_prompts_of_an_own_set_are_its_names(tmp_path: Path) -> None:
    for name in ("quux", "cat", "the_end", "apples"):
        image = Image.new("RGBA", (64, 64))
        image.paste((0, 205, 200, 255), (16, 16, 48, 48))
        image.save(tmp_path / f"{name}.png")
    dataset = read_dataset("composition", tmp_path, "plain")
    assert [item.captions[0] for item in dataset.items] == ["apples", "a cat", "a quux", "a the end"]
    assert dataset.skipped == ()


def test_networks_compare_the_same_crops(folder: Path, sprites: Extractor, mobilenet: Path) -> None:
    assert {"sprites", "sprites-mobilenet", "sprites-clip", "sprites-ranker"} <= set(EXTRACTORS)
    network = load_extractor("mobilenet", mobilenet)
    by_network = SpritesExtractor(name="x", sprites=sprite_set(folder), record={}, network=network)
    dataset = read_dataset("composition", folder, "plain")
    found = measured(by_network, dataset)
    # Equal crops have equal features, even in an untrained network.
    assert scored(found, [item.targets for item in dataset.items])["thing"] == 1


# ---------------------------------------------------------------- a complete run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The bundled protocol with few groups, samples and candidates."""
    values = yaml.safe_load((bundled_folder("protocols") / "composition.yaml").read_text("utf-8"))
    names = ("ground", "styles", "seen-ground")
    values["groups"] = {name: values["groups"][name] | {"samples": 6} for name in names}
    values["sampling"] |= {"candidates": 3, "chunk": 6}
    values["targets"] = [rule for rule in values["targets"] if rule["group"] in names]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_evaluation_from_protocol_to_report(
    small: Path, folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    primed: list[Any] = []
    sample = DallePipeline.sample

    def watched(self: DallePipeline, text: Tensor, *more: Any, given: Tensor | None = None, **options: Any) -> Tensor:
        codes = sample(self, text, *more, given=given, **options)
        primed.append(None if given is None else (given, codes))
        return codes

    monkeypatch.setattr(DallePipeline, "sample", watched)
    request = Request(
        protocol=str(small), out=tmp_path / "out", model=str(model), data=folder, networks={"sprites": folder}
    )
    result = evaluate(request)
    assert result is not None
    # One chunk of each generated group; the images of the last one begin with the codes of the upper two rows.
    assert [entry is None for entry in primed] == [True, False]
    given, codes = primed[-1]
    assert (given >= 0).sum((1, 2)).tolist() == [8] * 6
    assert codes[:, :, :2].equal(given[:, None, :2].expand(-1, 3, -1, -1))
    groups = {name: group["captions"] for name, group in result["groups"].items()}
    assert groups == {"ground": 6, "styles": 6, "seen-ground": 0}
    rows = {(r["group"], r["metric"], r["part"], r["images"]): r for r in result["scores"]}
    sets = ("real", "reconstructed", "generated", "candidates", "shuffled")
    for images in sets:
        row = rows["ground", "composition", "all", images]
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    assert rows["seen-ground", "bits_per_token", "right", "real"]["samples"] == 6
    assert any("sprites-mobilenet" in line for line in result["left_out"])
    assert {target["name"] for target in result["targets"]} >= {"unseen ground, the right color, best candidate"}
    tables = group_tables(read_result(tmp_path / "out/result.json"))
    head, *table = tables["Composition, everything that is asked for, %"]
    assert head[1:5] == ["real images (ceiling)", "reconstructions", "best of 3", "one image"]
    assert head[5] == "shuffled captions (floor)"
    assert [row[0] for row in table] == ["ground", "styles"]
    report = (tmp_path / "out/report.md").read_text("utf-8")
    assert "Memorization" in report
    assert "composition-all.png" in report
    assert "| ground |" in render_card(model, result).partition("Composition, the right thing, %:")[2]


def own_sprites(folder: Path, root: Path, styles: Sequence[str], things: Sequence[str]) -> Path:
    """Some of the sprites; those of a single style are in no folder of a style."""
    for style in styles:
        target = root / style if len(styles) > 1 else root
        target.mkdir(parents=True)
        for thing in things:
            shutil.copy(folder / style / f"{thing}.png", target)
    return root


@pytest.mark.parametrize(
    ("styles", "things", "allowed", "reasons"),
    [
        (["flat"], ["cat", "dog"], {"plain", "place", "seen-ground"}, {"styled": "style", "styles": "two styles"}),
        (["flat", "3d"], ["cat", "dog", "pizza"], {"plain", "styled", "place", "styles"}, {}),
    ],
)
@pytest.mark.parametrize("captions", [None, 3])
def test_groups_that_own_sprites_do_not_allow_are_left_out(
    styles: Sequence[str],
    things: Sequence[str],
    allowed: set[str],
    reasons: dict[str, str],
    captions: int | None,
    folder: Path,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = own_sprites(folder, tmp_path / "own", styles, things)
    changes = {"candidates": 2, "captions": captions}
    request = Request(
        protocol="composition", out=tmp_path / "out", model=str(model), data=own, networks={"sprites": own},
        changes=changes,
    )  # fmt: skip
    result = evaluate(request)
    assert result is not None
    groups, every = set(result["groups"]), set(find_protocol("composition").groups)
    assert allowed <= groups < every
    assert set(result["protocol"]["groups"]) == groups >= {target["group"] for target in result["protocol"]["targets"]}
    left_out = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert sorted(line.split()[2] for line in left_out) == sorted(every - groups)
    assert not [r for r in caplog.records if "entries left out" in r.getMessage()]
    for name, reason in reasons.items():
        assert any(line.startswith(f"the group {name} is left out: ") and reason in line for line in left_out)
        assert any(line.startswith(f"the group {name}: ") for line in result["left_out"])
    plain = [row for row in result["scores"] if row["group"] == "plain" and row["images"] == "real"]
    assert [row["value"] for row in plain if row["part"] == "thing"] == [1.0]
    assert (tmp_path / "out/report.md").is_file()
    written = write_captions("composition", tmp_path / "captions", data=own, count=captions)
    assert {path.stem.removeprefix("composition-") for path in written} == groups


def test_sprites_that_allow_no_group_raise_with_all_reasons(folder: Path, model: Path, tmp_path: Path) -> None:
    own = own_sprites(folder, tmp_path / "own", ["flat"], ["cat"])
    request = Request(
        protocol="composition", out=tmp_path / "out", model=str(model), data=own, networks={"sprites": own}
    )
    with pytest.raises(DatasetError, match="allows no group of composition:\n  the group plain: all prompts"):
        evaluate(request)
    with pytest.raises(DatasetError, match="allows no group of composition"):
        write_captions("composition", tmp_path / "captions", data=own)


def test_a_run_scores_its_samples_as_the_protocol_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_zoo_eval.sample_scores.bundled_folder", lambda: folder)
    score = CompositionScore(4)
    items = read_dataset("composition", folder, "plain").items[:4]
    assert score.prompts == tuple(item.captions[0] for item in items)
    images = torch.stack([load_image(item, "center", None) for item in items]).float() / 255
    assert score(images) == {"thing": 1.0}
    assert score(images.roll(1, 0)) == {"thing": 0.0}


def test_bundled_protocol_has_expected_groups_and_targets() -> None:
    protocol = find_protocol("composition")
    assert list(protocol.groups) == [
        "plain", "styled", *HELD_OUT, "place", "styles", *(f"seen-{kind}" for kind in HELD_OUT)
    ]  # fmt: skip
    assert protocol.sampling.candidates == 16
    assert protocol.groups["styles"].prime == 0.5
    assert METRICS.spec("composition").images == ("real", "reconstructed", "generated", "candidates", "shuffled")
    assert {target.group for target in protocol.targets if target.divided_by.get("group")} == {
        f"seen-{kind}" for kind in HELD_OUT
    }


# ---------------------------------------------------------------- the committed result of the bundled model


def test_bundled_protocol_samples_as_the_bundled_model() -> None:
    sampling, usual = find_protocol("composition").sampling, read_json(BUNDLED / DEFAULT_MODEL / SAMPLING)
    assert {name: getattr(sampling, name) for name in usual} == usual


def test_committed_result_is_of_the_committed_protocol() -> None:
    result, protocol = read_result(RESULT), find_protocol("composition")
    assert not result["protocol"].get("overridden"), "run `dalle-zoo eval composition` without other values"
    # Titles and notes may change without a new evaluation.
    measured = Protocol.from_dict(result["protocol"])
    assert replace(measured, title="x", notes=()) == replace(protocol, title="x", notes=())
    for name, group in result["groups"].items():
        head = (CAPTIONS / f"composition-{name}.jsonl").read_text("utf-8").partition("\n")[0]
        assert json.loads(head)["sha256"] == group["captions_sha256"]


def test_committed_report_equals_rendered_result(tmp_path: Path) -> None:
    folder = RESULT.with_suffix("")
    text = write_report([RESULT], tmp_path)[0].read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8") == text, "run `dalle-zoo report`"
    shown = set(re.findall(r"\]\((.+?\.png)\)", text))
    assert shown == {path.name for path in folder.glob("*.png")} == {path.name for path in tmp_path.glob("*.png")}
