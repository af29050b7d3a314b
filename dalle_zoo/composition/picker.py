"""Random choices of one sample: things, colors, and combinations that are held out of training or not."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TypeVar

from dalle_zoo.composition.colors import GROUNDS, HUES
from dalle_zoo.composition.sprites import Sprite, SpriteSet
from dalle_zoo.composition.words import is_countable, recolored_name, with_article

T = TypeVar("T")

HELD_OUT = 0.1
"""Share of the combinations that training never sees."""

_STYLED = (
    "a {style} emoji of {a}",
    "a {style} {name}",
    "{name}, {style} style",
    "{a} in {style} style",
    "{style} {name}",
    "a {style} drawing of {a}",
    "{style} emoji of {a}",
)
_PLAIN = (
    "{name}",
    "{name}",
    "{a}",
    "{a}",
    "{a}",
    "a drawing of {a}",
    "a picture of {a}",
    "an image of {a}",
    "an emoji of {a}",
    "an icon of {a}",
    "{name} emoji",
)
_STYLED_SHORT = ("a {style} emoji of {a}", "a {style} {name}")
_COMMON_KEYWORD = 12
"""A keyword is used as a name only if at most this many things have it."""


def is_held_out(kind: str, *parts: str) -> bool:
    """Whether a combination is never composed for training: a hash decides, so it is the same in every run.

    Args:
        kind: What is combined: "ground", "hue", "count" or "pair".
        parts: Its parts in order, such as the thing and the color.
    """
    digest = hashlib.sha256(":".join(["held out", kind, *parts]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < HELD_OUT


class Pools:
    """Sprites of one split, grouped for quick choices.

    Args:
        sprites: The set.
        split: "train", "val-styles" or "val-concepts".

    Raises:
        ValueError: The split is empty.
    """

    def __init__(self, sprites: SpriteSet, split: str) -> None:
        self.sprites = sprites
        self.all = [i for i, sprite in enumerate(sprites.sprites) if sprite.split == split]
        if not self.all:
            raise ValueError(f"the sprite set has no sprite in the split {split!r}")
        self.by_style: dict[str, list[int]] = defaultdict(list)
        self.by_thing: dict[str, list[int]] = defaultdict(list)
        for i in self.all:
            self.by_style[sprites.sprites[i].style].append(i)
            self.by_thing[sprites.sprites[i].thing].append(i)
        self.countable = [i for i in self.all if is_countable(sprites.sprites[i].names[0])]
        self.in_several_styles = [group for group in self.by_thing.values() if len(group) > 1]
        things_of: dict[str, set[str]] = defaultdict(set)
        for sprite in sprites.sprites:
            for keyword in sprite.keywords:
                things_of[keyword].add(sprite.thing)
        self.keywords = {k for k, things in things_of.items() if len(things) <= _COMMON_KEYWORD}

    @cached_property
    def single_hued(self) -> list[int]:
        """Sprites that a color word can change."""
        return [i for i in self.all if i in self.sprites.single_hued]


class Picker:
    """Choices of one sample, which depend only on its generator.

    Args:
        pools: Sprites to choose from.
        rng: Generator of the sample.
        held_out: False never picks a held-out combination, True picks nothing else.
    """

    def __init__(self, pools: Pools, rng: random.Random, held_out: bool = False) -> None:
        self.pools, self.rng, self.held_out = pools, rng, held_out

    def __getitem__(self, sprite: int) -> Sprite:
        return self.pools.sprites.sprites[sprite]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.rng.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of several, uniformly."""
        return self.rng.choice(options)

    def sprite(self, options: Sequence[int] | None = None) -> int:
        """A sprite, by default any of the split."""
        return self.rng.choice(self.pools.all if options is None else options)

    def flip(self, sprite: int) -> bool:
        """Whether to mirror it."""
        return self[sprite].mirrored and self.chance(0.3)

    def ground(self, sprites: Iterable[int], *, held_out: bool | None = None) -> str | None:
        """A ground color that these things may be combined with, None if there is none.

        Args:
            sprites: The things on it.
            held_out: As the picker's, by default; False where the combination is not what is being tested.
        """
        wanted = self.held_out if held_out is None else held_out
        things = [self[i].thing for i in sprites]
        free = [c for c in GROUNDS if any(is_held_out("ground", thing, c) for thing in things) == wanted]
        return self.rng.choice(free) if free else None

    def hue(self, sprite: int) -> str | None:
        """A color that this thing may be given, None if there is none."""
        free = [c for c in HUES if is_held_out("hue", self[sprite].thing, c) == self.held_out]
        return self.rng.choice(free) if free else None

    # ------------------------------------------------------------ words

    def name(self, sprite: int, color: str | None = None, *, keywords: bool = False) -> str:
        """A name of the thing, now and then a less common one or a keyword instead."""
        names = self[sprite].names
        name = names[0] if len(names) == 1 or self.chance(0.6) else self.choice(names[1:])
        if color is not None:
            return recolored_name(name, color)
        if keywords and self.chance(0.08):
            known = [k for k in self[sprite].keywords if k in self.pools.keywords]
            return self.choice(known) if known else name
        return name

    def phrase(self, sprite: int, color: str | None = None) -> str:
        """A caption of one thing: bare, with an article, as a drawing of it, with its style or without."""
        style, name = self[sprite].style, self.name(sprite, color, keywords=True)
        template = self.choice(_STYLED if style and self.chance(0.4) else _PLAIN)
        caption = template.format(style=style, name=name, a=with_article(name))
        if self[sprite].keywords and self.chance(0.08):
            extra = self.rng.sample(self[sprite].keywords, min(len(self[sprite].keywords), self.rng.randint(1, 2)))
            caption = ", ".join([caption, *extra])
        return caption

    def short_phrase(self, sprite: int, color: str | None = None, *, styled: float = 0.3) -> str:
        """A noun phrase to be used inside a sentence."""
        style, name = self[sprite].style, self.name(sprite, color)
        template = self.choice(_STYLED_SHORT) if style and self.chance(styled) else "{a}"
        return template.format(style=style, name=name, a=with_article(name))

    def on_ground(self, caption: str, ground: str | None) -> str:
        """The caption with its background; a white one is seldom mentioned."""
        if ground is None:
            return f"{caption} on a white background" if self.chance(0.08) else caption
        templates = (" on {a} background", " on {a} background", " on {name}", ", {name} background")
        return caption + self.choice((*templates, " with {a} background")).format(name=ground, a=with_article(ground))
