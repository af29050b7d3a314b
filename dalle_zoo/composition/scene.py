"""Scenes: sprites placed on a ground, and their rendering."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle_zoo.composition.colors import GROUNDS, recolored
from dalle_zoo.composition.sprites import SIZE, SpriteSet

Pixels = npt.NDArray[np.uint8]

_VISIBLE = 16
"""Least opacity that counts as covered, of 255."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A sprite at a position.

    Example:
        >>> Placed(sprite=3)  # fills the image
        Placed(sprite=3, size=64, left=0, top=0, flipped=False, color=None)
    """

    sprite: int
    """Index in the sprite set."""
    size: int = SIZE
    """Side, pixels."""
    left: int = 0
    """Distance of its box from the left border, pixels."""
    top: int = 0
    """Distance from the top border, pixels."""
    flipped: bool = False
    """Whether it is mirrored horizontally."""
    color: str | None = None
    """Name in `HUES` of the color that replaces its dominant hue. Defaults to none."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Contents of an image, sufficient to render it and to compare another image with it.

    Example:
        >>> from dalle_zoo.composition import Composer, CompositionConfig
        >>> scene = Composer(CompositionConfig.load().open_sprites(), shares={"pair": 1.0}).compose(0).scene
        >>> scene.kind, len(scene.items), scene.relation in ("beside", "above")
        ('pair', 2, True)
    """

    kind: str
    """Name of the kind in `KINDS`."""
    items: tuple[Placed, ...]
    """Sprites in reading order: left before right, top before bottom."""
    ground: str | None = None
    """Name in `GROUNDS`; None is white."""
    relation: str | None = None
    """"beside" or "above" if two things are related."""


def render(scene: Scene, sprites: SpriteSet) -> Pixels:
    """Renders a scene to uint8 (64, 64, 3).

    Example:
        >>> from dalle_zoo.composition.sprites import Sprite
        >>> square = np.zeros((1, SIZE, SIZE, 4), np.uint8)
        >>> square[:, 16:48, 16:48] = 255, 0, 0, 255  # red and opaque
        >>> sprites = SpriteSet([Sprite(key="square", thing="square", names=("square",), style="flat")], square)
        >>> pixels = render(Scene(kind="single", items=(Placed(sprite=0, size=32, left=32),)), sprites)
        >>> pixels[16, 48].tolist(), pixels[48, 16].tolist()  # row, column
        ([255, 0, 0], [255, 255, 255])
    """
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = 255 if scene.ground is None else GROUNDS[scene.ground]
    for item in scene.items:
        _paste(canvas, _pixels(item, sprites), item.left, item.top)
    return (canvas + 0.5).clip(0, 255).astype(np.uint8)


def coverage(item: Placed, sprites: SpriteSet) -> npt.NDArray[np.bool_]:
    """Returns which pixels of an image a placed sprite visibly covers: bool (64, 64)."""
    canvas = np.zeros((SIZE, SIZE, 3), np.float32)
    alpha = np.repeat(_pixels(item, sprites)[..., 3:], 4, -1)
    alpha[..., 3] = 0  # nothing of the canvas shows through
    _paste(canvas, alpha, item.left, item.top)
    return canvas[..., 0] >= _VISIBLE


def _pixels(item: Placed, sprites: SpriteSet) -> Pixels:
    """Returns the pixels of a placed sprite, premultiplied RGBA, uint8 (size, size, 4)."""
    image: Pixels = sprites.pixels[item.sprite]
    if item.color is not None:
        image = recolored(image, item.color)
    if item.flipped:
        image = image[:, ::-1]
    if item.size == SIZE:
        return image
    full = Image.frombytes("RGBa", (SIZE, SIZE), image.tobytes())
    return np.asarray(full.resize((item.size, item.size), Image.Resampling.BILINEAR, reducing_gap=3))


def _paste(canvas: npt.NDArray[np.float32], image: Pixels, left: int, top: int) -> None:
    side = len(image)
    region = canvas[max(0, top) : top + side, max(0, left) : left + side]
    part = image[max(0, -top) :, max(0, -left) :][: len(region), : region.shape[1]].astype(np.float32)
    region *= 1 - part[..., 3:] / 255
    region += part[..., :3]
