from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_zoo.composition import (
    COMBINATIONS,
    KINDS,
    SHARES,
    Composer,
    CompositionConfig,
    Placed,
    Scene,
    SpriteSet,
    is_held_out,
    render,
)
from dalle_zoo.composition.colors import GROUNDS, HUES, dominant_hue, recolored
from dalle_zoo.composition.kinds import NUMBERS
from dalle_zoo.composition.picker import HELD_OUT
from dalle_zoo.data import CompositionSource, ImageTextDataset, ResumableLoader, open_source
from dalle_zoo.data.composition import SPLITS, ppm
from dalle_zoo.data.samples import Sample
from dalle_zoo.registry import UnknownNameError

COUNT = 1000


def combination(sprites: SpriteSet, scene: Scene) -> tuple[str, ...] | None:
    """What a scene combines, as the argument of `is_held_out`; None for kinds that combine nothing."""
    things = [sprites.sprites[item.sprite].thing for item in scene.items]
    if scene.kind == "ground":
        return ("ground", things[0], str(scene.ground))
    if scene.kind == "hue":
        return ("hue", things[0], str(scene.items[0].color))
    if scene.kind == "count":
        return ("count", things[0], str(len(things)))
    return ("pair", *things) if scene.kind == "pair" else None


def test_a_sample_depends_on_seed_and_index_alone(sprites: SpriteSet) -> None:
    one, other = Composer(sprites, seed=3), Composer(sprites, seed=3)
    forward, backward = [one.compose(i) for i in range(50)], [other.compose(i) for i in reversed(range(50))]
    assert forward == backward[::-1]
    assert np.array_equal(one.render(forward[7]), other.render(backward[-8]))
    assert [Composer(sprites, seed=4).compose(i) for i in range(50)] != forward


def test_composing_takes_less_than_a_millisecond(sprites: SpriteSet) -> None:
    composer = Composer(sprites)
    composer.compose(0)  # finds the single-hued sprites once
    start = time.process_time()
    for index in range(300):
        composer.render(composer.compose(index))
    # A third of the limit on an idle machine; three times that is allowed where other work slows the memory.
    assert (time.process_time() - start) / 300 < 3e-3


def test_training_never_sees_a_held_out_combination(sprites: SpriteSet) -> None:
    train, held_out = Composer(sprites), Composer(sprites, held_out=True)
    for index in range(COUNT):
        seen = combination(sprites, train.compose(index).scene)
        assert seen is None or not is_held_out(*seen)
        unseen = combination(sprites, held_out.compose(index).scene)
        assert unseen is not None
        assert is_held_out(*unseen)


@pytest.mark.parametrize("kind", ["place", "pair", "count"])
def test_no_thing_is_on_a_ground_that_is_held_out_for_it(sprites: SpriteSet, kind: str) -> None:
    composer = Composer(sprites, shares={kind: 1})
    scenes = [scene for index in range(COUNT) if (scene := composer.compose(index).scene).ground is not None]
    assert len(scenes) > COUNT / 10
    for scene in scenes:
        for item in scene.items:
            assert not is_held_out("ground", sprites.sprites[item.sprite].thing, str(scene.ground))


def test_a_tenth_of_the_combinations_is_held_out() -> None:
    things = sorted({sprite.thing for sprite in CompositionConfig().open_sprites().sprites})
    for kind, parts in (("ground", list(GROUNDS)), ("hue", list(HUES)), ("count", ["2", "3", "4"])):
        share = np.mean([is_held_out(kind, thing, part) for thing in things for part in parts])
        assert share == pytest.approx(HELD_OUT, abs=0.015)  # at least 1,700 combinations: three standard errors
    assert np.mean([is_held_out("pair", a, b) for a, b in pairwise(things * 3)]) == pytest.approx(HELD_OUT, abs=0.04)


def test_splits_share_no_sprite(sprites: SpriteSet) -> None:
    split = {i: sprite.split for i, sprite in enumerate(sprites.sprites)}
    train_things = {sprite.thing for sprite in sprites.sprites if sprite.split == "train"}
    for name in ("train", "val-styles", "val-concepts"):
        scenes = [Composer(sprites, split=name, shares={"single": 1}).compose(i).scene for i in range(200)]
        assert {split[item.sprite] for scene in scenes for item in scene.items} == {name}
        things = {sprites.sprites[item.sprite].thing for scene in scenes for item in scene.items}
        assert things <= train_things if name != "val-concepts" else not things & train_things


def test_kinds_come_in_their_shares(sprites: SpriteSet) -> None:
    composer = Composer(sprites)
    made = [composer.compose(i).scene.kind for i in range(COUNT)]
    for kind, share in SHARES.items():
        # Kinds that refuse some choices give others a little more.
        assert made.count(kind) / COUNT == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("kind", list(SHARES))
def test_every_kind_says_what_it_shows(sprites: SpriteSet, kind: str) -> None:
    composer = Composer(sprites, shares={kind: 1})
    for index in range(100):
        sample = composer.compose(index)
        scene, caption = sample.scene, sample.caption
        assert scene.kind == kind
        assert scene.ground is None or scene.ground in caption
        assert kind != "count" or NUMBERS[len(scene.items)] in caption
        for item in scene.items:
            assert item.color is None or item.color in caption
            assert 0 <= item.left <= 64 - item.size
            assert 0 <= item.top <= 64 - item.size
            # At multiples of the side of an image token, so that a thing has nearly the same tokens everywhere.
            assert item.left % 4 == item.top % 4 == 0
            assert item.size in (32, 64)


def test_the_dominant_hue_is_that_of_the_pixels() -> None:
    for color, hue in (((0, 205, 200, 255), 178.5), ((255, 20, 0, 255), 4.7), ((255, 0, 40, 255), 350.6)):
        sprite = np.zeros((64, 64, 4), np.uint8)
        sprite[8:50, 8:50] = color
        found, share, saturated = dominant_hue(sprite)
        # Hues are bytes; 3 degrees are two of them.
        assert abs((found - hue + 180) % 360 - 180) < 3
        assert (share, saturated) == (1, 1)


def test_captions_are_what_people_type(sprites: SpriteSet) -> None:
    composer = Composer(sprites)
    said = " | ".join(composer.compose(i).caption for i in range(COUNT))
    assert "a drawing of " in said
    assert "sampling" not in said  # a word of this project, not of a prompt


def test_pairs_are_named_in_their_order(sprites: SpriteSet) -> None:
    composer = Composer(sprites, shares={"pair": 1})
    checked = 0
    for index in range(300):
        scene, caption = (sample := composer.compose(index)).scene, sample.caption
        first, second = (sprites.sprites[item.sprite].names for item in scene.items)
        a, b = (min((caption.find(n) for n in names if n in caption), default=-1) for names in (first, second))
        if a < 0 or b < 0 or a == b:
            continue  # one name inside the other
        turned = any(words in caption for words in (" to the right of ", " below "))
        if " below " in caption:
            assert scene.relation == "above"
        assert (a < b) != turned, caption
        checked += 1
    assert checked > 200


def test_pixels_are_where_the_scene_says(sprites: SpriteSet) -> None:
    composer = Composer(sprites, shares={"place": 1})
    for index in range(50):
        scene = (sample := composer.compose(index)).scene
        item, image = scene.items[0], composer.render(sample).astype(int)
        ground = np.array((255, 255, 255) if scene.ground is None else GROUNDS[scene.ground])
        outside = np.ones((64, 64), bool)
        outside[item.top : item.top + item.size, item.left : item.left + item.size] = False
        assert np.abs(image[outside] - ground).max() == 0
        assert np.abs(image[~outside] - ground).max() > 20


def test_a_flipped_thing_is_mirrored_at_its_place(sprites: SpriteSet) -> None:
    for item in (Placed(sprite=3), Placed(sprite=3, size=32, left=16, top=8)):
        image, mirrored = (
            render(Scene(kind="single", items=(replace(item, flipped=flipped),)), sprites).astype(int)
            for flipped in (False, True)
        )
        # A smaller thing is resized after it is mirrored, which rounds other values.
        assert np.abs(mirrored - image[:, ::-1]).max() <= 2
        assert np.abs(mirrored - image).max() > 100


def test_recoloring_gives_the_hue_and_keeps_the_shape(sprites: SpriteSet) -> None:
    composer = Composer(sprites)
    for index in composer.pools.single_hued[:15]:
        image = sprites.pixels[index]
        for color, degrees in HUES.items():
            changed = recolored(image, color)
            assert np.array_equal(changed[..., 3], image[..., 3])
            hue, _, saturated = dominant_hue(changed)
            if saturated > 0.3:  # pink can be too pale to have a hue, and leaves those of small parts
                assert abs((hue - degrees + 180) % 360 - 180) <= (40 if color == "pink" else 25)


def test_the_source_composes_anew_in_each_epoch_and_resumes() -> None:
    dataset = ImageTextDataset(open_source("composition:train"), transform="prior", size=64)
    complete = ResumableLoader(dataset, 4, seed=1)
    batches = iter(complete)
    first = [next(batches)["caption"] for _ in range(3)]
    state = complete.state_dict()
    after = next(batches)
    resumed = ResumableLoader(dataset, 4, seed=1)
    resumed.load_state_dict(state)
    again = next(iter(resumed))
    assert again["caption"] == after["caption"]
    assert again["image"].equal(after["image"])
    later = ResumableLoader(dataset, 4, seed=1)
    later.load_state_dict({**state, "epoch": 1, "batches": 0})
    assert next(iter(later))["caption"] != first[0]


def test_epochs_of_a_seed_continue_its_samples(own_sprites: Path) -> None:
    (own_sprites / "own.yaml").write_text("sprites: sprites\nsamples: 10\n")
    source = CompositionSource(CompositionConfig.load(own_sprites / "own.yaml"))
    composer = source.composer(3)
    images = []
    for epoch in (0, 1, 7):
        read = [s for s in source.read(seed=3, epoch=epoch, start=0, stop=10) if isinstance(s, Sample)]
        composed = [composer.compose(epoch * 10 + position) for position in range(10)]
        assert [s.captions for s in read] == [(c.caption,) for c in composed]
        images.append([s.image for s in read])
        assert images[-1] == [ppm(composer.render(c)) for c in composed]
    assert images[0] != images[1] != images[2]


def test_a_sample_is_rendered_only_when_its_image_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    records = list(open_source("composition:train").read(seed=1, epoch=2, start=3, stop=6))
    assert all(record.image.startswith(b"P6 64 64 255") for record in records if isinstance(record, Sample))
    monkeypatch.setattr(Composer, "render", None)
    again = list(open_source("composition:train").read(seed=1, epoch=2, start=3, stop=6))
    assert [record.key for record in again] == [record.key for record in records]


def test_images_reach_the_network_as_composed() -> None:
    source = CompositionSource(CompositionConfig.load())
    item = next(iter(ImageTextDataset(source, transform="prior", size=64)))
    composer = source.composer("stored train")
    expected = composer.render(composer.compose(0))
    assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), expected)


def test_things_choose_what_is_trained_and_keep_what_is_tested(sprites: SpriteSet) -> None:
    chosen = sprites.subset(styles=["flat", "3d"], things=["cat", "pizza"])
    assert {(s.names[0], s.style) for s in chosen.sprites if s.split == "train"} == {
        (name, style) for name in ("cat", "pizza") for style in ("flat", "3d")
    }
    untrained = {s.key for s in sprites.sprites if s.split == "val-concepts" and s.style != "cartoon"}
    assert {s.key for s in chosen.sprites if s.split == "val-concepts"} == untrained
    config = CompositionConfig(things=("cat", "pizza"))
    assert config.open_sprites().subset(["flat", "3d"]).sprites == chosen.sprites
    composer = Composer(config.open_sprites())
    assert all("cat" in text or "pizza" in text for text in (composer.compose(i).caption for i in range(20)))


def test_other_things_are_another_composition() -> None:
    configs = (CompositionConfig(things=things) for things in ((), ("cat",), ("cat", "pizza")))
    assert len({CompositionSource(config).fingerprint() for config in configs}) == 3


@pytest.mark.parametrize(
    ("things", "message"),
    [
        (("cat", "piza"), r"no thing 'piza' in the sprite set \(did you mean 'pizza'\?\): expected some of"),
        (("qqq",), "no thing 'qqq' in the sprite set: expected some of"),
    ],
)
def test_an_unknown_thing_is_refused_with_the_nearest_one(things: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompositionConfig(things=things).open_sprites()


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_opens(split: str) -> None:
    source = open_source(f"composition:{split}")
    assert source.num_samples == (20_000 if split == "train" else 1_000)
    assert all(isinstance(s, Sample) and s.captions for s in source.read(seed=None, epoch=0, start=0, stop=3))
    kinds = {s.key.split("-")[0] for s in source.read(seed=None, epoch=0, start=0, stop=40) if isinstance(s, Sample)}
    assert kinds <= {"single"} if split.startswith("val") else kinds
    assert split != "held-out" or kinds <= set(COMBINATIONS)


def save_sprite(path: Path) -> None:
    """Saves a red square on a transparent background."""
    image = Image.new("RGBA", (40, 40))
    image.paste((255, 0, 0, 255), (5, 5, 35, 35))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def own_sprites(tmp_path: Path) -> Path:
    """A person's own transparent images: two styles of three things."""
    for style, value in (("flat", 255), ("pencil", 90)):
        folder = tmp_path / "sprites" / style
        folder.mkdir(parents=True)
        for number, name in enumerate(("red_fox", "boat", "house")):
            image = np.zeros((40, 80, 4), np.uint8)
            image[5:35, 10:70, number] = value
            image[5:35, 10:70, 3] = 255
            Image.fromarray(image).save(folder / f"{name}.png")
    return tmp_path


def test_own_sprites_take_the_place_of_the_bundled_ones(own_sprites: Path) -> None:
    (own_sprites / "own.yaml").write_text("sprites: sprites\nsamples: 40\n")
    source = open_source(f"{own_sprites / 'own.yaml'}:train")
    samples = [s for s in source.read(seed=0, epoch=0, start=0, stop=40) if isinstance(s, Sample)]
    assert len(samples) == 40
    assert any("red fox" in s.captions[0] or "fox" in s.captions[0] for s in samples)
    assert any("pencil" in s.captions[0] for s in samples)


def test_an_own_kind_is_a_short_function(sprites: SpriteSet) -> None:
    from dalle_zoo.composition import Picker

    @KINDS.register("test-corner")
    def corner(pick: Picker) -> tuple[Scene, str] | None:
        sprite = pick.sprite()
        return Scene(kind="test-corner", items=(Placed(sprite=sprite, size=20),)), f"{pick.short_phrase(sprite)}, tiny"

    sample = Composer(sprites, shares={"test-corner": 1}).compose(0)
    assert sample.caption.endswith("tiny")
    assert (render(sample.scene, sprites)[30:, 30:] == 255).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shares: {singel: 1}", "single"),
        ("shares: {single: 0}", "share above 0"),
        ("shares: {single: -1}", "at least 0"),
        ("samples: 0", "samples must be an integer of at least 1, got 0"),
        ("styels: [3d]", "styels"),
        ("[1, 2]", "list"),
        ("[]", "own.yaml holds list: expected the keys sprites, styles"),
        ("false", "own.yaml holds bool: expected the keys"),
        ("styles: [oil]", "oil"),
        ("sprites: nowhere", "does not exist"),
        ("sprites: 5", "sprites must be the path of a folder, got 5"),
        ("samples: many", "samples must be an integer of at least 1, got 'many'"),
        ("shares: [single]", r"shares must be a mapping of kinds to numbers, got \('single',\)"),
        ("shares: {single: x}", "the share of 'single' must be a finite number of at least 0, got 'x'"),
        ("shares: {single: .inf}", "the share of 'single' must be a finite number"),
        ("styles: 3d", "styles must be a list of names, got '3d'"),
        ("{a: &a [1], b: *a}", "own.yaml has aliases"),
        ("[" * 100, "own.yaml nests lists"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises((ValueError, TypeError, UnknownNameError), match=message):
        open_source(f"{tmp_path / 'own.yaml'}:train")


def test_an_empty_file_has_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("# nothing\n")
    assert CompositionConfig.load(tmp_path / "own.yaml") == CompositionConfig()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            "held-out",
            "allow no held-out combination of pair, since few sprites have few or none: add sprites, give a share to "
            r"kinds that they allow, or leave the held-out data out \(`--data.val null`\)",
        ),
        ("train", "allow none of pair: add sprites, or give a share to kinds that they allow"),
    ],
)
def test_too_few_sprites_are_refused(tmp_path: Path, split: str, message: str) -> None:
    save_sprite(tmp_path / "sprites/fox.png")
    (tmp_path / "own.yaml").write_text("sprites: sprites\nshares: {pair: 1}\n")
    with pytest.raises(ValueError, match=message):
        open_source(f"{tmp_path / 'own.yaml'}:{split}").fingerprint()


def test_unknown_splits_and_opaque_or_damaged_sprites_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held-out"):
        open_source("composition:test")
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match="no transparency"):
        SpriteSet.load(tmp_path)
    Image.new("RGBA", (8, 16), (0, 0, 0, 255)).save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"cat\.png has no transparency: save it with a transparent background"):
        SpriteSet.load(tmp_path)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"cat\.png is fully transparent: save it with a visible thing"):
        SpriteSet.load(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cat\.png cannot be read"):
        SpriteSet.load(tmp_path)
    (tmp_path / "cat.png").unlink()
    with pytest.raises(ValueError, match="holds no image"):
        SpriteSet.load(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"sprites.jsonl, line 2 is not valid JSON"),
        ("[]", r"sprites.jsonl, line 2 must contain a JSON object, got list"),
        ('{"key": "b"}', "line 2 lacks thing: build or install"),
        ('{"key": "b", "thing": 5, "names": ["b"], "style": ""}', "line 2: thing has an invalid value, 5"),
        ('{"key": "b", "thing": "b", "names": [5], "style": ""}', "line 2: names has an invalid value"),
        ('{"key": "b", "thing": "b", "names": ["b"], "style": ""}', "sprites.tar is damaged"),
    ],
)
def test_a_damaged_set_is_refused(tmp_path: Path, record: str, message: str) -> None:
    (tmp_path / "sprites.jsonl").write_text('{"key": "a", "thing": "a", "names": ["a"], "style": ""}\n' + record)
    (tmp_path / "sprites.tar").write_text("damaged")
    with pytest.raises(ValueError, match=message):
        SpriteSet.load(tmp_path)


def test_names_of_sprites_are_valid_unicode(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8)).save(tmp_path / "caf\udce9.png")
    with pytest.raises(ValueError, match="has a name that is not UTF-8: rename it"):
        SpriteSet.load(tmp_path)


@pytest.mark.parametrize("name", ["_.png", "- -.webp", "a\nb.png", "a\tb.png", "_/fox.png", "oil\n/fox.png"])
def test_names_of_sprites_give_words(tmp_path: Path, name: str) -> None:
    save_sprite(tmp_path / name)
    with pytest.raises(ValueError, match="has a name without words or with control characters: rename it") as error:
        SpriteSet.load(tmp_path)
    assert repr(str(tmp_path / name)) in str(error.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("red-fox.png", "red_fox.png"),
        ("Red Fox.webp", "red_fox.png"),
        ("fox.png", "fox.webp"),
        ("Flat/fox.png", "flat/fox.png"),
    ],
)
def test_a_thing_has_one_sprite_per_style(tmp_path: Path, first: str, second: str) -> None:
    for name in (first, second):
        save_sprite(tmp_path / name)
    with pytest.raises(ValueError, match=r"show the same thing, '(red )?fox', in the same style: remove") as error:
        SpriteSet.load(tmp_path)
    assert f"{str(tmp_path / first)!r} and {str(tmp_path / second)!r}" in str(error.value)


def test_the_python_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs/train/composition.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    done = subprocess.run(  # a process of its own: the example registers a kind
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_states_what_there_is(sprites: SpriteSet) -> None:
    page = (Path(__file__).parents[2] / "docs/train/composition.md").read_text(encoding="utf-8")
    complete = SpriteSet.load()
    things = len({sprite.thing for sprite in complete.sprites})
    assert f"{len(complete):,} of {things} things in four styles" in page
    trained = len({sprite.thing for sprite in sprites.sprites if sprite.split == "train"})
    assert f"{len(sprites):,} sprites: {trained} things" in page
    assert f"It knows {trained} common" in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for kind, share in SHARES.items():
        assert f"| `{kind}` | {share:.0%} |".replace("%", " %") in page
