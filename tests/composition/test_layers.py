"""Layers of composed scenes: which token of which layer an image token equals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from dalle_zoo.composition import KINDS, Composer, Placed, Scene, SpriteSet, render
from dalle_zoo.composition.colors import GROUNDS, HUES, dominant_hue, nearest_hue
from dalle_zoo.composition.layers import layers
from dalle_zoo.composition.scene import coverage
from dalle_zoo.composition.sprites import SIZE

GRID = 16
SIDE = SIZE // GRID


def patches(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pixels (..., 64, 64, 3) by image token, (..., 16, 16, 4, 4, 3)."""
    return pixels.reshape(*pixels.shape[:-3], GRID, SIDE, GRID, SIDE, 3).swapaxes(-4, -3)


@pytest.mark.parametrize("kind", sorted(set(KINDS) & {"single", "ground", "hue", "place", "pair", "count", "styles"}))
def test_layers_show_what_the_tokens_of_the_image_show(kind: str, sprites: SpriteSet) -> None:
    composer = Composer(sprites, seed=2, shares={kind: 1.0})
    for index in range(20):
        scene = composer.compose(index).scene
        found = layers(scene, sprites, GRID)
        assert found.images.dtype == np.uint8
        assert found.images.shape == (1 + len({(i.sprite, i.size) for i in scene.items}), SIZE, SIZE, 3)
        assert found.cells.shape == (GRID, GRID)
        # The things of the bundled kinds never share a token, so the image is none of the layers.
        alone = patches(found.images).reshape(-1, SIDE, SIDE, 3)[found.cells].astype(int)
        own = replace(scene, items=tuple(replace(item, color=None) for item in scene.items))
        image = patches(render(own, sprites)).astype(int)
        things = found.cells >= GRID**2
        assert np.abs(alone - image)[~things].max(initial=0) <= 16  # invisible parts of things count as ground
        if scene.ground is None:
            assert np.abs(alone - image).max() <= 16
        assert things.any()


def test_a_thing_has_the_same_tokens_on_every_ground_and_at_every_place(sprites: SpriteSet) -> None:
    def of(ground: str | None, *items: Placed) -> npt.NDArray[np.int64]:
        found = layers(Scene(kind="x", items=items, ground=ground), sprites, GRID)
        layer = Placed(sprite=3, size=32, left=16, top=16)
        assert np.array_equal(found.images[1], render(Scene(kind="x", items=(layer,)), sprites))
        return found.cells

    def part(cells: npt.NDArray[np.int64], left: int, top: int) -> npt.NDArray[np.int64]:
        return cells[top : top + 8, left : left + 8]

    thing = Placed(sprite=3, size=32, left=32, top=4)
    plain = of(None, thing)
    for color in GROUNDS:
        assert np.array_equal(of(color, thing), plain)
    moved = of("red", Placed(sprite=3, size=32, left=0, top=28), Placed(sprite=9, size=32, left=32, top=28))
    assert np.array_equal(part(moved, 0, 7), part(plain, 8, 1))


def test_only_whole_tokens_are_moved(sprites: SpriteSet) -> None:
    item = Placed(sprite=3, size=20, left=1, top=45)
    found = layers(Scene(kind="x", items=(item,)), sprites, GRID)
    moved = Placed(sprite=3, size=20, left=21, top=21)  # the middle is at 22, and both are 1 beyond a token
    assert np.array_equal(found.images[1], render(Scene(kind="x", items=(moved,)), sprites))
    alone = patches(found.images).reshape(-1, SIDE, SIDE, 3)[found.cells]
    assert np.abs(alone.astype(int) - patches(render(Scene(kind="x", items=(item,)), sprites))).max() <= 16


@pytest.mark.parametrize(("size", "left", "top"), [(64, 1, 0), (60, 3, 3), (62, 2, 2), (80, -16, -16), (32, 50, -9)])
def test_large_things_and_those_partly_outside_stay_whole(size: int, left: int, top: int, sprites: SpriteSet) -> None:
    scene = Scene(kind="x", items=(Placed(sprite=3, size=size, left=left, top=top),))
    found = layers(scene, sprites, GRID)
    alone = patches(found.images).reshape(-1, SIDE, SIDE, 3)[found.cells]
    assert np.abs(alone.astype(int) - patches(render(scene, sprites))).max() <= 16


def test_tokens_that_show_two_things_are_those_of_the_image(sprites: SpriteSet) -> None:
    one, other = Placed(sprite=3), Placed(sprite=9, size=32, left=30, top=30)
    scene = Scene(kind="x", items=(one, other))
    found = layers(scene, sprites, GRID)
    both = [coverage(item, sprites).reshape(GRID, SIDE, GRID, SIDE).any((1, 3)) for item in (one, other)]
    meet = both[0] & both[1]
    assert meet.any()
    assert np.array_equal(found.images[-1], render(scene, sprites))
    assert np.array_equal(found.cells // GRID**2 == len(found.images) - 1, meet)
    assert np.array_equal(found.cells[meet] % GRID**2, np.flatnonzero(meet))


def test_a_grid_that_does_not_divide_the_image_is_refused(sprites: SpriteSet) -> None:
    with pytest.raises(ValueError, match="grid must divide 64, got 10"):
        layers(Scene(kind="x", items=()), sprites, 10)


def test_layers_have_their_own_color(sprites: SpriteSet) -> None:
    red = next(i for i in sorted(sprites.single_hued) if nearest_hue(dominant_hue(sprites.pixels[i])[0]) == "red")
    thing = Placed(sprite=red, size=32, left=0, top=0)
    scene = Scene(kind="x", items=(thing, replace(thing, left=32, color="blue"), replace(thing, top=32, color="pink")))
    found = layers(scene, sprites, GRID)
    names = list(HUES)
    assert found.recolored.tolist() == [
        [-1, -1], [-1, -1], [names.index("red"), names.index("blue")], [names.index("red"), names.index("pink")],
    ]  # fmt: skip
    assert np.array_equal(found.images[1], found.images[2])
    assert np.array_equal(found.images[1], found.images[3])
    numbers = found.cells // GRID**2
    assert numbers[:8, :8].max() == 1
    assert numbers[:8, 8:].max() == 2
    assert numbers[8:, :8].max() == 3
    meeting = replace(scene, items=(thing, replace(thing, left=6, color="blue")))
    assert layers(meeting, sprites, GRID).recolored[-1].tolist() == [-1, -1]  # the whole image has its colors
