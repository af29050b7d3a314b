"""The kinds of composed samples: short functions that choose a scene and its caption.

To add a kind, write a function that maps a `Picker` to a `Scene` and its caption, or to None if its choices allow no
scene (another attempt follows), and register it:

```python
@KINDS.register("corner")
def corner(pick: Picker) -> tuple[Scene, str] | None:
    sprite = pick.sprite()
    scene = Scene(kind="corner", items=(Placed(sprite=sprite, size=20),))
    return scene, f"{pick.short_phrase(sprite)} in the corner"
```

`SHARES` has the default share of each kind; a configuration file can override them.

The things of these kinds fill the image or are half as large, and they begin at multiples of 4 pixels, the side of an
image token: then a thing has nearly the same image tokens at every place, and a prior learns to compose from fewer
samples. For the same reason only single things on white are mirrored.
"""

from __future__ import annotations

from collections.abc import Callable

from dalle_zoo.composition.picker import Picker, is_held_out
from dalle_zoo.composition.scene import Placed, Scene
from dalle_zoo.composition.sprites import SIZE
from dalle_zoo.composition.words import plural, with_article
from dalle_zoo.registry import Registry

Kind = Callable[[Picker], tuple[Scene, str] | None]

KINDS: Registry[Kind] = Registry("kind of composition", group="dalle_zoo.compositions")

SHARES = {
    "ground": 0.25,
    "single": 0.22,
    "pair": 0.18,
    "hue": 0.15,
    "styles": 0.08,
    "count": 0.07,
    "place": 0.05,
}
"""Default share of each kind among the samples."""

PLACES = {
    "in the top left corner": (0.0, 0.0),
    "in the top right corner": (1.0, 0.0),
    "in the bottom left corner": (0.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "in the middle": (0.5, 0.5),
}
"""Places of small things, as shares of the free space from the left and from the top."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
_HALF = SIZE // 2
GRIDS = {
    2: ((0, _HALF // 2), (_HALF, _HALF // 2)),
    3: ((_HALF // 2, 0), (0, _HALF), (_HALF, _HALF)),
    4: ((0, 0), (_HALF, 0), (0, _HALF), (_HALF, _HALF)),
}
"""Left and top of counted things by their number, pixels."""


@KINDS.register("single")
def single(pick: Picker) -> tuple[Scene, str] | None:
    """Composes one thing on white that fills the image."""
    sprite = pick.sprite()
    scene = Scene(kind="single", items=(Placed(sprite=sprite, flipped=pick.flip(sprite)),))
    return scene, pick.on_ground(pick.phrase(sprite), None)


@KINDS.register("ground")
def ground(pick: Picker) -> tuple[Scene, str] | None:
    """Composes one thing that fills the image, on a colored ground."""
    sprite = pick.sprite()
    color = pick.ground([sprite])
    if color is None:
        return None
    item = Placed(sprite=sprite)
    return Scene(kind="ground", items=(item,), ground=color), pick.on_ground(pick.phrase(sprite), color)


@KINDS.register("hue")
def hue(pick: Picker) -> tuple[Scene, str] | None:
    """Composes one thing in another color."""
    if not pick.pools.single_hued:
        return None
    sprite = pick.sprite(pick.pools.single_hued)
    color = pick.hue(sprite)
    if color is None:
        return None
    item = Placed(sprite=sprite, color=color)
    return Scene(kind="hue", items=(item,)), pick.on_ground(pick.phrase(sprite, color), None)


@KINDS.register("place")
def place(pick: Picker) -> tuple[Scene, str] | None:
    """Composes a small thing at a named place."""
    sprite = pick.sprite()
    where, (x, y) = pick.choice(tuple(PLACES.items()))
    color = pick.ground([sprite], held_out=False) if pick.chance(0.2) else None
    item = Placed(sprite=sprite, size=_HALF, left=int(x * _HALF), top=int(y * _HALF))
    caption = pick.short_phrase(sprite)
    if caption.startswith(("a ", "an ")) and pick.chance(0.7):
        caption = f"a small {caption.split(' ', 1)[1]}"
    caption = pick.on_ground(f"{caption} {where}", color)
    return Scene(kind="place", items=(item,), ground=color), caption


@KINDS.register("pair")
def pair(pick: Picker) -> tuple[Scene, str] | None:
    """Composes two things, one next to or above the other."""
    style = pick.choice(tuple(pick.pools.by_style))
    pool = pick.pools.by_style[style] if pick.chance(0.8) else None
    first, second = pick.sprite(pool), pick.sprite(pool)
    things = (pick[first].thing, pick[second].thing)
    if things[0] == things[1] or is_held_out("pair", *things) != pick.held_out:
        return None
    beside = pick.chance(2 / 3)
    color = pick.ground([first, second], held_out=False) if pick.chance(0.2) else None
    spots = ((0, _HALF // 2), (_HALF, _HALF // 2)) if beside else ((_HALF // 2, 0), (_HALF // 2, _HALF))
    items = tuple(
        Placed(sprite=sprite, size=_HALF, left=left, top=top)
        for sprite, (left, top) in zip((first, second), spots, strict=True)
    )
    scene = Scene(kind="pair", items=items, ground=color, relation="beside" if beside else "above")
    return scene, pick.on_ground(_related(pick, first, second, beside), color)


def _related(pick: Picker, first: int, second: int, beside: bool) -> str:
    together = pick.chance(0.6)  # no style, or one style for both at the end of the caption
    a, b = (pick.short_phrase(sprite, styled=0.0 if together else 0.4) for sprite in (first, second))
    templates = (
        ("{a} and {b}", "{a} next to {b}", "{a} to the left of {b}", "{a} left of {b}", "{b} to the right of {a}")
        if beside
        else ("{a} above {b}", "{b} below {a}", "{a} on top of {b}")
    )
    caption = pick.choice(templates).format(a=a, b=b)
    if together and pick[first].style == pick[second].style and pick[first].style and pick.chance(0.3):
        caption += f", {pick[first].style} style"
    return caption


@KINDS.register("count")
def count(pick: Picker) -> tuple[Scene, str] | None:
    """Composes two to four copies of one thing."""
    if not pick.pools.countable:
        return None
    sprite, number = pick.sprite(pick.pools.countable), pick.choice(tuple(NUMBERS))
    if is_held_out("count", pick[sprite].thing, str(number)) != pick.held_out:
        return None
    color = pick.ground([sprite], held_out=False) if pick.chance(0.2) else None
    items = tuple(Placed(sprite=sprite, size=_HALF, left=left, top=top) for left, top in GRIDS[number])
    style, words = pick[sprite].style, NUMBERS[number]
    templates = ["{n} {things}", "{n} {things}", "a drawing of {n} {things}"]
    if style:
        templates += ["{n} {style} {things}", "{n} {things}, {style} style"]
    caption = pick.choice(templates).format(n=words, things=plural(pick[sprite].names[0]), style=style)
    return Scene(kind="count", items=items, ground=color), pick.on_ground(caption, color)


@KINDS.register("styles")
def styles(pick: Picker) -> tuple[Scene, str] | None:
    """Composes one thing in two styles, one above the other (as in section 3.3 of the paper)."""
    if not pick.pools.in_several_styles:
        return None
    top, bottom = pick.rng.sample(pick.choice(pick.pools.in_several_styles), 2)
    left = _HALF // 2
    items = tuple(Placed(sprite=sprite, size=_HALF, left=left, top=y) for sprite, y in ((top, 0), (bottom, _HALF)))
    caption = pick.choice(
        (
            "a {one} emoji of {a} on top, the same as a {two} emoji at the bottom",
            "{name} in {one} style on top, in {two} style at the bottom",
            "the same {name} as a {one} emoji on top and as a {two} emoji at the bottom",
        )
    )
    name = pick[top].names[0]
    caption = caption.format(one=pick[top].style, two=pick[bottom].style, name=name, a=with_article(name))
    return Scene(kind="styles", items=items, relation="above"), caption
