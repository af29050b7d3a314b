"""Random choices for a sample: things, colors and captions, with or without held-out combinations."""

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
"""Share of combinations that are held out of training."""

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
"""Maximum number of things with a keyword that can replace a name."""


def is_held_out(kind: str, *parts: str) -> bool:
    """Returns whether a combination is held out of training, decided by a hash and therefore the same in every run.

    Args:
        kind: Kind of combination: "ground", "hue", "count" or "pair".
        parts: Parts of the combination in order, such as thing and color.

    Example:
        >>> is_held_out("ground", "robot", "gray"), is_held_out("ground", "robot", "red")
        (True, False)
    """
    digest = hashlib.sha256(":".join(["held out", kind, *parts]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < HELD_OUT


class Pools:
    """Sprites of one split, grouped for fast choices.

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
        """Sprites that can be recolored."""
        return [i for i in self.all if i in self.sprites.single_hued]


class Picker:
    """Random choices for one sample, which depend only on its generator.

    Args:
        pools: Sprites to choose from.
        rng: Generator of the sample.
        held_out: Whether only held-out combinations are picked. Defaults to False, which never picks them.

    Example:
        >>> import numpy as np
        >>> sprites = [Sprite(key=name, thing=name, names=(name,), style="flat") for name in ("fox", "owl", "cat")]
        >>> pools = Pools(SpriteSet(sprites, np.zeros((3, 64, 64, 4), np.uint8)), "train")
        >>> first, again = Picker(pools, random.Random(0)), Picker(pools, random.Random(0))
        >>> first.phrase(first.sprite()) == again.phrase(again.sprite())
        True
    """

    def __init__(self, pools: Pools, rng: random.Random, held_out: bool = False) -> None:
        self.pools, self.rng, self.held_out = pools, rng, held_out

    def __getitem__(self, sprite: int) -> Sprite:
        return self.pools.sprites.sprites[sprite]

    def chance(self, probability: float) -> bool:
        """Returns True with a probability."""
        return self.rng.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        """Returns one of several options, uniformly."""
        return self.rng.choice(options)

    def sprite(self, options: Sequence[int] | None = None) -> int:
        """Returns one of several sprites. Defaults to all sprites of the split."""
        return self.rng.choice(self.pools.all if options is None else options)

    def flip(self, sprite: int) -> bool:
        """Returns whether to mirror a sprite."""
        return self[sprite].mirrored and self.chance(0.3)

    def ground(self, sprites: Iterable[int], *, held_out: bool | None = None) -> str | None:
        """Returns a ground color that may be combined with things; None if there is none.

        Args:
            sprites: Sprites on the ground.
            held_out: Whether the combination is held out. Defaults to the value of the picker.
        """
        wanted = self.held_out if held_out is None else held_out
        things = [self[i].thing for i in sprites]
        free = [c for c in GROUNDS if any(is_held_out("ground", thing, c) for thing in things) == wanted]
        return self.rng.choice(free) if free else None

    def hue(self, sprite: int) -> str | None:
        """Returns a color for a thing; None if there is none."""
        free = [c for c in HUES if is_held_out("hue", self[sprite].thing, c) == self.held_out]
        return self.rng.choice(free) if free else None

    # ------------------------------------------------------------ words

    def name(self, sprite: int, color: str | None = None, *, keywords: bool = False) -> str:
        """Returns a name of the thing, sometimes a less common one or a keyword."""
        names = self[sprite].names
        name = names[0] if len(names) == 1 or self.chance(0.6) else self.choice(names[1:])
        if color is not None:
            return recolored_name(name, color)
        if keywords and self.chance(0.08):
            known = [k for k in self[sprite].keywords if k in self.pools.keywords]
            return self.choice(known) if known else name
        return name

    def phrase(self, sprite: int, color: str | None = None) -> str:
        """Returns a caption of one thing, with or without article, medium and style."""
        style, name = self[sprite].style, self.name(sprite, color, keywords=True)
        template = self.choice(_STYLED if style and self.chance(0.4) else _PLAIN)
        caption = template.format(style=style, name=name, a=with_article(name))
        if self[sprite].keywords and self.chance(0.08):
            extra = self.rng.sample(self[sprite].keywords, min(len(self[sprite].keywords), self.rng.randint(1, 2)))
            caption = ", ".join([caption, *extra])
        return caption

    def short_phrase(self, sprite: int, color: str | None = None, *, styled: float = 0.3) -> str:
        """Returns a noun phrase for use within a sentence."""
        style, name = self[sprite].style, self.name(sprite, color)
        template = self.choice(_STYLED_SHORT) if style and self.chance(styled) else "{a}"
        return template.format(style=style, name=name, a=with_article(name))

    def on_ground(self, caption: str, ground: str | None) -> str:
        """Returns a caption with its background; white is rarely mentioned."""
        if ground is None:
            return f"{caption} on a white background" if self.chance(0.08) else caption
        templates = (" on {a} background", " on {a} background", " on {name}", ", {name} background")
        return caption + self.choice((*templates, " with {a} background")).format(name=ground, a=with_article(ground))
