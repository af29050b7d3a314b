"""Measures ground, layout, hues and things of a composed scene in the pixels of an image.

Nothing is learned: the ground is the color of the border, and things are the pixels that differ from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.composition.colors import GROUNDS, HUES
from dalle_zoo.composition.kinds import GRIDS
from dalle_zoo.composition.sprites import SIZE

# B images, S side of an image (64), R regions, G grounds, U hues, n side of a crop

WHITE = "white"
GROUND_NAMES = (WHITE, *GROUNDS)
"""Distinguished grounds; captions do not mention white."""
HUE_NAMES = tuple(HUES)
"""Distinguished hues of things."""
_HALF = SIZE // 2
REGIONS = {
    "all": (0, 0, SIZE, SIZE),
    "left": (0, 0, _HALF, SIZE),
    "right": (_HALF, 0, SIZE, SIZE),
    "top": (0, 0, SIZE, _HALF),
    "bottom": (0, _HALF, SIZE, SIZE),
    "top left": (0, 0, _HALF, _HALF),
    "top right": (_HALF, 0, SIZE, _HALF),
    "bottom left": (0, _HALF, _HALF, SIZE),
    "bottom right": (_HALF, _HALF, SIZE, SIZE),
}
"""Left, top, right and bottom of the parts of an image in which one thing is expected, pixels."""
LAYOUTS = {
    "one": (SIZE, ((0, 0),)),
    "one small": (_HALF, ((_HALF // 2, _HALF // 2),)),
    "beside": (_HALF, GRIDS[2]),
    "above": (_HALF, ((_HALF // 2, 0), (_HALF // 2, _HALF))),
    "three": (_HALF, GRIDS[3]),
    "four": (_HALF, GRIDS[4]),
}
"""Side of the things, and left and top of each, in the distinguished layouts, pixels."""
LAYOUT_REGIONS = {
    "one": ("all",),
    "one small": ("all",),
    "beside": ("left", "right"),
    "above": ("top", "bottom"),
    "three": ("top", "bottom left", "bottom right"),
    "four": ("top left", "top right", "bottom left", "bottom right"),
}
"""Regions of the things of each layout, in reading order."""
CROP = 12
"""Side of a cut-out thing, pixels: enough to find the sprite of 99 % of reconstructions of single things."""

_RING = 2
"""Width of the border that determines the ground, pixels."""
_FAINT, _CLEAR = 24, 60
"""Differences from the ground, in 0..255, at which the coverage of a pixel is 0 and 1."""
_SPECK = 2
"""Minimum number of pixels in a row or column of a thing; fewer are noise of a reconstruction."""


def to_side(images: Tensor) -> Tensor:
    """Scales uint8 images (B, 3, H, W) to float32 (B, 3, S, S) in 0..255."""
    pixels = images.float()
    if images.shape[-2:] == (SIZE, SIZE):
        return pixels
    return F.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


def ground_shares(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Measures the ground color in the border.

    Args:
        pixels: Pixels in 0..255, (B, 3, S, S).

    Returns:
        Share of the border that is nearest to each of `GROUND_NAMES`, (B, G), and the mean color of the largest
        share, (B, 3).
    """
    ring = torch.ones(SIZE, SIZE, dtype=torch.bool)
    ring[_RING:-_RING, _RING:-_RING] = False
    border = pixels[:, :, ring].transpose(1, 2)
    named = torch.tensor([(255, 255, 255), *GROUNDS.values()], dtype=torch.float32)
    nearest = torch.cdist(border, named.expand(len(border), -1, -1)).argmin(-1)
    shares = F.one_hot(nearest, len(named)).float().mean(1)
    own = (nearest == shares.argmax(1, keepdim=True)).float()
    return shares, (border * own[..., None]).sum(1) / own.sum(1, keepdim=True)


def coverage(pixels: Tensor, ground: Tensor) -> Tensor:
    """Returns the coverage of each pixel by things, from 0 to 1.

    Args:
        pixels: Pixels in 0..255, (B, 3, S, S).
        ground: Color of the ground, (B, 3).

    Returns:
        Coverage, (B, S, S).
    """
    difference = (pixels - ground[:, :, None, None]).abs().amax(1)
    return ((difference - _FAINT) / (_CLEAR - _FAINT)).clamp(0, 1)


def hue_shares(pixels: Tensor, covered: Tensor) -> Tensor:
    """Returns the share of saturated pixels of things nearest to each of `HUE_NAMES`, (B, U); 0 if none are."""
    rgb = pixels / 255
    value, low = rgb.amax(1), rgb.amin(1)
    span = value - low
    red, green, blue = rgb.unbind(1)
    safe = span.clamp(min=1e-6)
    other = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    degrees = torch.where(value == red, (green - blue) / safe, other)
    named = torch.tensor(list(HUES.values()), dtype=torch.float32)
    apart = (60 * degrees[..., None] - named + 180).remainder(360) - 180
    weights = covered * ((span / value.clamp(min=1e-6) > 0.27) & (value > 0.2))  # as in `colors.dominant_hue`
    shares = (F.one_hot(apart.abs().argmin(-1), len(named)) * weights[..., None]).sum((1, 2))
    return shares / shares.sum(1, keepdim=True).clamp(min=1)


def layout_templates(alpha: Tensor) -> Tensor:
    """Returns the coverage by average things in each of `LAYOUTS`, (layouts, d), for `nearest_layout`.

    Args:
        alpha: Mean opacity of the sprites, (S, S).
    """
    templates = torch.zeros(len(LAYOUTS), SIZE, SIZE)
    for template, (side, spots) in zip(templates, LAYOUTS.values(), strict=True):
        thing = F.adaptive_avg_pool2d(alpha[None], side)[0]
        for left, top in spots:
            template[top : top + side, left : left + side] += thing
    return _coarse(templates)


def nearest_layout(covered: Tensor, templates: Tensor) -> Tensor:
    """Returns the index in `LAYOUTS` of the most similar layout, (B,).

    Places of things are compared instead of counting connected components. This finds nearly all composed counts,
    compared with 74 % by connected components: a pair of dice has two components, and neighboring things touch.
    """
    return (_coarse(covered) @ templates.t()).argmax(1)


def _coarse(covered: Tensor) -> Tensor:
    return centered(F.avg_pool2d(covered[:, None], SIZE // 8).flatten(1))


def centered(values: Tensor) -> Tensor:
    """Subtracts the mean of the last axis and scales it to length 1, so that dot products are correlations."""
    return F.normalize(values - values.mean(-1, keepdim=True), dim=-1)


def cut_out(
    pixels: Tensor, covered: Tensor, region: tuple[int, int, int, int], side: int = CROP
) -> tuple[Tensor, Tensor]:
    """Cuts out the thing in a region, puts it on white and scales it to fill a square.

    Args:
        pixels: Pixels in 0..255, (B, 3, S, S).
        covered: Coverage, from `coverage`, (B, S, S).
        region: Left, top, right and bottom, pixels.
        side: Side n of the crops, pixels. Defaults to `CROP`.

    Returns:
        Crops, (B, 3, n, n), where 0 is white and 1 is black, and their boxes, int64 (B, 4): left, top, right and
        bottom in pixels, or zeros if the region is empty.
    """
    left, top, right, bottom = region
    inside = torch.zeros_like(covered)
    inside[:, top:bottom, left:right] = covered[:, top:bottom, left:right]
    solid = (inside > 0.5).float()
    columns, rows = solid.sum(1) >= _SPECK, solid.sum(2) >= _SPECK
    found = (columns.any(1) & rows.any(1))[:, None]
    box = torch.stack([*_ends(columns), *_ends(rows)], 1)[:, [0, 2, 1, 3]] * found
    scale = torch.maximum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]).clamp(min=1) / SIZE
    center = (box[:, :2] + box[:, 2:]) / SIZE - 1
    affine = torch.zeros(len(pixels), 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = scale, scale, center
    # Sampling at twice the side and averaging is close to an area average for things of up to half of the image.
    grid = F.affine_grid(affine, [len(pixels), 3, 2 * side, 2 * side], align_corners=False)
    on_white = (1 - pixels / 255) * inside[:, None]
    return F.avg_pool2d(F.grid_sample(on_white, grid, align_corners=False), 2), box


def _ends(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the first occupied index and the one after the last, (B,) each."""
    first = occupied.int().argmax(1)
    return first, occupied.shape[1] - occupied.flip(1).int().argmax(1)


def color_features(crops: Tensor) -> Tensor:
    """Maps crops (..., 3, n, n) to unit vectors that represent shape and color."""
    return centered(crops.flatten(-3))


def shape_features(crops: Tensor) -> Tensor:
    """Maps crops (..., 3, n, n) to unit vectors of brightness and saturation, which are the same for every hue."""
    brightest, darkest = 1 - crops.amin(-3), 1 - crops.amax(-3)
    parts = [centered(brightest.flatten(-2)), centered((brightest - darkest).flatten(-2))]
    return F.normalize(torch.cat(parts, -1), dim=-1)
