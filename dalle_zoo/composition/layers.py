"""The layers of a scene: its ground and each of its things alone, and which image token shows which of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dalle_zoo.composition.colors import HUES
from dalle_zoo.composition.scene import Pixels, Placed, Scene, coverage, render
from dalle_zoo.composition.sprites import SIZE, SpriteSet

# L layers, h w of the grid of image tokens

_UNCHANGED = (-1, -1)


@dataclass(frozen=True)
class Layers:
    """The ground and the things of a scene, each alone in an image."""

    images: Pixels
    """The ground, every different thing on white, near the middle and in its own color, and last, if things meet
    within an image token, the whole image; uint8 (L, 64, 64, 3)."""
    cells: npt.NDArray[np.int64]
    """For each image token of the scene, the token of a layer with the same contents: the index among all L h w
    tokens of the layers in reading order, int64 (h, w)."""
    recolored: npt.NDArray[np.int64]
    """For each layer, which has its own color, the indices in `HUES` of the color that the thing has and of the one
    that replaces it in the scene, int64 (L, 2); -1 if it is not recolored."""


def layers(scene: Scene, sprites: SpriteSet, grid: int) -> Layers:
    """Separates a scene into its layers.

    A thing is moved toward the middle by whole image tokens, so that its tokens depend only on its size and on its
    place within a token. All tokens of the ground are compared with one token in its middle.

    Args:
        scene: The scene.
        sprites: Its sprites.
        grid: Image tokens in a row and in a column.

    Raises:
        ValueError: The grid does not divide the side of the image.

    Example:
        >>> from dalle_zoo.composition.sprites import Sprite
        >>> square = np.zeros((1, SIZE, SIZE, 4), np.uint8)
        >>> square[:, 16:48, 16:48] = 255, 0, 0, 255  # red and opaque
        >>> sprites = SpriteSet([Sprite(key="square", thing="square", names=("square",), style="flat")], square)
        >>> scene = Scene(kind="ground", items=(Placed(sprite=0),), ground="blue")
        >>> layers(scene, sprites, grid=4).cells  # 10 is the ground's token, those from 16 on show the square on white
        array([[10, 10, 10, 10],
               [10, 21, 22, 10],
               [10, 25, 26, 10],
               [10, 10, 10, 10]])
    """
    if SIZE % grid:
        raise ValueError(f"grid must divide {SIZE}, got {grid}")
    side = SIZE // grid
    images = [render(Scene(kind="ground", items=(), ground=scene.ground), sprites)]
    cells = np.full((grid, grid), (grid // 2) * (grid + 1), np.int64)
    owners = np.zeros((grid, grid), np.int64)
    recolored = [_UNCHANGED]
    numbers: dict[Placed, int] = {}
    for item in scene.items:
        alone = replace(
            item, left=_toward_middle(item.left, item.size, side), top=_toward_middle(item.top, item.size, side)
        )
        if alone not in numbers:
            numbers[alone] = len(images)
            images.append(render(Scene(kind="single", items=(replace(alone, color=None),)), sprites))
            recolored.append(_colors(item, sprites))
        shown = coverage(item, sprites).reshape(grid, side, grid, side).any((1, 3))
        rows, columns = np.nonzero(shown)
        there = (rows + (alone.top - item.top) // side) * grid + columns + (alone.left - item.left) // side
        cells[rows, columns] = numbers[alone] * grid * grid + there
        owners += shown
    if (meet := owners > 1).any():
        cells[meet] = len(images) * grid * grid + np.flatnonzero(meet)
        images.append(render(scene, sprites))
        recolored.append(_UNCHANGED)
    return Layers(np.stack(images), cells, np.array(recolored))


def _colors(item: Placed, sprites: SpriteSet) -> tuple[int, int]:
    """Indices in `HUES` of the color of a sprite and of the one that replaces it."""
    if item.color is None:
        return _UNCHANGED
    names = list(HUES)
    return names.index(sprites.color(item.sprite)), names.index(item.color)


def _toward_middle(start: int, size: int, side: int) -> int:
    """Moves a start by whole tokens to near the middle; leaves it where the thing would then be cut off."""
    middle = (SIZE - size) // 2
    moved = middle - (middle - start) % side
    moved += side if moved < 0 else 0
    return moved if 0 <= moved <= SIZE - size else start
