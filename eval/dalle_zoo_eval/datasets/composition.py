"""Prompts for composed scenes, each with a composed image and with targets for metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dalle_zoo.composition import Composed, Composer, CompositionConfig, Placed, Scene, Sprite, SpriteSet, render
from dalle_zoo.composition.composer import NothingComposedError
from dalle_zoo.composition.kinds import PLACES
from dalle_zoo.composition.sprites import SIZE
from dalle_zoo.composition.sprites import bundled_folder as sprites_folder
from dalle_zoo.composition.words import with_article
from dalle_zoo.data.composition import ppm
from dalle_zoo.seeds import seeded_rng
from dalle_zoo_eval.data_files import bundled_folder
from dalle_zoo_eval.datasets.base import DATASETS, EvalDataset, Item, UnavailableGroupError, check_split
from dalle_zoo_eval.scene_pixels import LAYOUT_REGIONS

PROMPTS = "composition-prompts.txt"
"""File of the plain prompts, next to the protocols."""
NAMED = ("plain", "styled")
"""Splits of the prompts of that file: unchanged, and with a style."""
HELD_OUT = ("ground", "hue", "count", "pair")
"""Splits of combinations that are held out of training; with the prefix ``seen-``, of combinations that are not."""
TRAINED = ("place", "styles")
"""Splits of kinds without held-out combinations."""
SPLITS = (*NAMED, *HELD_OUT, *(f"seen-{kind}" for kind in HELD_OUT), *TRAINED)
PROMPTS_OF_A_KIND = 128
"""Number of prompts of each composed split; protocols use fewer."""
NO_STYLES = "no sprite has a style: put them into a folder for each style, such as flat/cat.png"
NOT_ALLOWED = {
    "ground": "its things allow no such ground: more things allow some",
    "hue": "no sprite of a single hue allows such a color: more things allow some",
    "pair": "its things allow no such pair: more things allow some",
    "count": "its things allow no such number: more things allow some",
    "styles": "no thing is in two styles: put the same name into a folder for each style, such as flat/cat.png",
}
"""Why sprites may allow no scene of a kind."""
_ARTICLE = re.compile("^(a|an|the) ")


@DATASETS.register("composition")
def read_composition(root: Path | None, split: str) -> EvalDataset:
    """Composes prompts and images from sprites, deterministically.

    Plain and styled prompts are those of a list for the bundled set, and name all things of any other set.

    Args:
        root: Folder of sprites, as for `SpriteSet.load`; None selects the bundled set. For any other set, also pass
            ``--network sprites=FOLDER``.
        split: One of `SPLITS`.

    Raises:
        UnknownNameError: There is no such split.
        UnavailableGroupError: The sprites allow no prompt of the split, or only prompts of one thing.
        ValueError: The folder holds no sprites.
    """
    check_split("composition", split, SPLITS)
    sprites = trained_sprites(root or sprites_folder())
    skipped: list[str] = []
    own = root not in (None, sprites_folder())
    prompts = _own_prompts(sprites) if own else read_prompts()
    items = list(_named(sprites, split, prompts, skipped) if split in NAMED else _composed(sprites, split))
    _check_concepts(split, items)
    name = f"composition:{split}"
    return EvalDataset(
        name=name, root=name if root is None else root, items=tuple(items), skipped=tuple(skipped), any_number=own
    )


@cache
def sprite_set(folder: Path) -> SpriteSet:
    """Returns the sprites of a folder, read once per process because all groups and the extractor use them."""
    return SpriteSet.load(folder)


@cache
def trained_sprites(folder: Path) -> SpriteSet:
    """Returns the styles and things of the training data, for the bundled set; all sprites of any other set."""
    sprites, trained = sprite_set(folder), CompositionConfig.load()
    return sprites.subset(trained.styles, trained.things) if folder == sprites_folder() else sprites


def read_prompts() -> list[str]:
    """Returns the plain prompts."""
    lines = (bundled_folder("protocols") / PROMPTS).read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _own_prompts(sprites: SpriteSet) -> list[str]:
    """Returns a plain prompt for every thing of a set of the user's own."""
    return list(dict.fromkeys(with_article(s.names[0]) for s in sprites.sprites if s.split == "train"))


def _check_concepts(split: str, items: Sequence[Item]) -> None:
    """Raises `UnavailableGroupError` if there are no prompts, or only prompts of one thing: scores need others."""
    kind = split.removeprefix("seen-")
    if not items:
        why = NO_STYLES if split == "styled" else NOT_ALLOWED.get(kind, "its things are of another split")
        raise UnavailableGroupError(f"the sprites allow no prompt: {why}")
    if len({item.concept for item in items}) == 1:
        raise UnavailableGroupError(
            f"all prompts that the sprites allow are of {items[0].concept!r}, and prompts of two different things are "
            "needed: add more things"
        )


def _named(sprites: SpriteSet, split: str, prompts: Sequence[str], skipped: list[str]) -> Iterator[Item]:
    """Yields single things by name, in a style chosen by seed; adds prompts without a sprite to ``skipped``."""
    by_name: dict[str, list[int]] = {}
    for place in range(max(len(sprite.names) for sprite in sprites.sprites)):  # less common names come last
        for i, sprite in enumerate(sprites.sprites):
            if sprite.split == "train" and place < len(sprite.names):
                found = by_name.setdefault(sprite.names[place], [])
                if not found or sprites.sprites[found[0]].thing == sprite.thing:
                    found.append(i)
    for prompt in prompts:
        name = prompt if prompt in by_name else _ARTICLE.sub("", prompt)
        known = by_name.get(name, [])
        usable = [i for i in known if split != "styled" or sprites.sprites[i].style]
        if not usable:
            skipped.append(f"{prompt}: {'its sprites have no style' if known else 'no sprite of that name'}")
            continue
        chosen = seeded_rng("evaluation", split, prompt).choice(usable)
        sprite = sprites.sprites[chosen]
        targets: dict[str, Any] = {"things": {"all": sprite.thing}}
        if split == "styled":
            prompt = f"a {sprite.style} emoji of {with_article(name)}"
            targets["styles"] = {"all": sprite.style}
        scene = Scene(kind="single", items=(Placed(sprite=chosen),))
        yield _item(sprites, split, Composed(0, scene, prompt), targets, f"{split}-{name.replace(' ', '-')}")


def _composed(known: SpriteSet, split: str) -> Iterator[Item]:
    """Yields scenes of one kind with captions as in the training data, each caption once."""
    kind = split.removeprefix("seen-")
    composer = Composer(known, seed=f"evaluation {split}", shares={kind: 1.0}, held_out=split in HELD_OUT)
    captions: set[str] = set()
    for index in range(10 * PROMPTS_OF_A_KIND):
        try:
            sample = composer.compose(index)
        except NothingComposedError:
            return
        if sample.caption in captions:
            continue
        captions.add(sample.caption)
        targets = _targets(sample, [known.sprites[item.sprite] for item in sample.scene.items])
        yield _item(known, split, sample, targets, f"{split}-{index:04d}")
        if len(captions) == PROMPTS_OF_A_KIND:
            return


def _item(sprites: SpriteSet, split: str, sample: Composed, targets: dict[str, Any], key: str) -> Item:
    return Item(
        key=key,
        image=ppm(render(sample.scene, sprites)),
        captions=(sample.caption,),
        concept=" and ".join(dict.fromkeys(targets["things"].values())),
        targets={"kind": split.removeprefix("seen-"), **targets},
    )


def _targets(sample: Composed, shown: list[Sprite]) -> dict[str, Any]:
    """Returns what an image of a caption should show."""
    scene = sample.scene
    if scene.kind == "styles":  # the top half is given
        return {"things": {"bottom": shown[1].thing}, "styles": {"bottom": shown[1].style}}
    if scene.kind == "place":
        return {"things": {"all": shown[0].thing}, "place": _place(sample)}
    if scene.kind in ("pair", "count"):
        layout = {3: "three", 4: "four"}.get(len(shown), scene.relation or "beside")
        things = {region: s.thing for region, s in zip(LAYOUT_REGIONS[layout], shown, strict=True)}
        return {"things": things, "layout": layout}
    targets: dict[str, Any] = {"things": {"all": shown[0].thing}}
    return targets | ({"ground": scene.ground} if scene.kind == "ground" else {"hue": scene.items[0].color})


def _place(sample: Composed) -> list[float]:
    """Returns the place of a single thing as shares of the free space, from `PLACES`."""
    (item,) = sample.scene.items
    x, y = (at / max(1, SIZE - item.size) for at in (item.left, item.top))  # a kind of one's own may fill the image
    nearest = min(PLACES.values(), key=lambda place: abs(place[0] - x) + abs(place[1] - y))
    return list(nearest)
