"""Finds the sprites that an image shows, and their places, by comparing things with all sprites."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.composition import Placed, Scene, Sprite, SpriteSet, render
from dalle_zoo.composition.picker import is_held_out
from dalle_zoo.composition.sprites import bundled_folder
from dalle_zoo_eval.datasets.composition import sprite_set
from dalle_zoo_eval.extractors.base import EXTRACTORS, Extractor, ExtractorFileError, check_images, exact_float32
from dalle_zoo_eval.extractors.clip import load_clip, load_ranker
from dalle_zoo_eval.extractors.mobilenet import load_mobilenet
from dalle_zoo_eval.scene_pixels import (
    CROP,
    GROUND_NAMES,
    HUE_NAMES,
    LAYOUT_REGIONS,
    LAYOUTS,
    REGIONS,
    WHITE,
    color_features,
    coverage,
    cut_out,
    ground_shares,
    hue_shares,
    layout_templates,
    nearest_layout,
    shape_features,
    to_side,
)

# B images, R regions, N sprites and mirrored sprites, d features

THUMBNAIL = 16
"""Side of the thumbnails that distinguish images, pixels."""
EMPTY = -1
"""Value instead of a sprite for an empty region."""
NETWORK_SIDE = 64
"""Side of cut-out things for a network, pixels."""


def identifier(name: str) -> int:
    """Returns a number for a thing or style, the same in every sprite set: the first bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


@dataclass(frozen=True, kw_only=True)
class SpritesExtractor:
    """Compares the things of an image with sprites by pixels, or by the features of a network."""

    name: str
    sprites: SpriteSet
    record: Mapping[str, Any]
    network: Extractor | None = None
    """Network whose features are compared. Defaults to None, which compares pixels."""

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the images as they are."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Measures uint8 images (B, 3, H, W).

        Returns:
            A dict with

            - ``grounds`` (B, G) and ``hues`` (B, U): shares of colors;
            - ``layout`` (B,): index in `LAYOUTS`;
            - ``boxes`` (B, R, 4): box of the thing in every region, pixels;
            - ``things``, ``shapes`` and ``styles``, int64 (B, R): `identifier` of the nearest sprite's thing, of the
              nearest sprite's thing regardless of hue, and of its style; `EMPTY` for empty regions;
            - ``novel`` (B, 4): whether the ground, hue, number and order of things are held out of training;
            - ``thumbnails``, uint8 (B, 3, 16, 16).
        """
        check_images(images)
        with exact_float32(torch.device("cpu")):
            pixels = to_side(images)
            grounds, color = ground_shares(pixels)
            covered = coverage(pixels, color)
            cut = (cut_out(pixels, covered, region, self._side) for region in REGIONS.values())
            crops, box = (torch.stack(parts, 1) for parts in zip(*cut, strict=True))
            empty = box[..., 2] == 0
            by_color, by_shape = self._nearest(crops)
            found = {
                "grounds": grounds,
                "hues": hue_shares(pixels, covered),
                "layout": nearest_layout(covered, self._templates),
                "boxes": box,
                "things": self._things[by_color].masked_fill(empty, EMPTY),
                "shapes": self._things[by_shape].masked_fill(empty, EMPTY),
                "styles": self._styles[by_color].masked_fill(empty, EMPTY),
                "thumbnails": F.adaptive_avg_pool2d(pixels, THUMBNAIL).round().to(torch.uint8),
            }
            return found | {"novel": self._novel(found, by_color, by_shape)}

    # ------------------------------------------------------------ gallery

    @property
    def _side(self) -> int:
        return CROP if self.network is None else NETWORK_SIDE

    @cached_property
    def _mirrored(self) -> list[int]:
        return [i for i, sprite in enumerate(self.sprites.sprites) if sprite.mirrored]

    @cached_property
    def _order(self) -> list[int]:
        """Sprite of every entry of the gallery: all, then those that may be mirrored."""
        return [*range(len(self.sprites)), *self._mirrored]

    @cached_property
    def _things(self) -> Tensor:
        return torch.tensor([identifier(self.sprites.sprites[i].thing) for i in self._order])

    @cached_property
    def _styles(self) -> Tensor:
        return torch.tensor([identifier(self.sprites.sprites[i].style) for i in self._order])

    @cached_property
    def _templates(self) -> Tensor:
        return layout_templates(torch.from_numpy(self.sprites.pixels[..., 3]).float().mean(0) / 255)

    @cached_property
    def _gallery(self) -> tuple[Tensor, Tensor]:
        """Features of the sprites by color and by shape, (N, d) each."""
        scenes = (Scene(kind="single", items=(Placed(sprite=i),)) for i in range(len(self.sprites)))
        images = torch.stack([torch.from_numpy(render(scene, self.sprites)) for scene in scenes])
        pixels = images.permute(0, 3, 1, 2).float()
        covered = coverage(pixels, torch.full((len(pixels), 3), 255.0))
        crops, _ = cut_out(pixels, covered, REGIONS["all"], self._side)
        return self._features(torch.cat([crops, crops[self._mirrored].flip(3)]))

    def _features(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features of crops (..., 3, n, n) for color and for shape; those of a network are used for both."""
        if self.network is None:
            return color_features(crops), shape_features(crops)
        images = ((1 - crops) * 255).round().to(torch.uint8).flatten(0, -4)
        features = self.network(self.network.prepare(images))["features"]
        unit = F.normalize(features.reshape(*crops.shape[:-3], -1), dim=-1)
        return unit, unit

    def _nearest(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the nearest entry of the gallery by color and by shape, (B, R) each."""
        pairs = zip(self._features(crops), self._gallery, strict=True)
        by_color, by_shape = ((features @ gallery.t()).argmax(-1) for features, gallery in pairs)
        return by_color, by_shape

    # ------------------------------------------------------------ held-out combinations

    def _novel(self, found: Mapping[str, Tensor], by_color: Tensor, by_shape: Tensor) -> Tensor:
        """Returns which combinations of an image are held out, in the order of `COMBINATIONS`, bool (B, 4)."""
        rows = []
        for i in range(len(by_color)):
            things = dict(zip(REGIONS, (self._sprite(int(j)).thing for j in by_color[i]), strict=True))
            shape = self._order[int(by_shape[i, 0])]
            ground = GROUND_NAMES[int(found["grounds"][i].argmax())]
            hue = HUE_NAMES[int(found["hues"][i].argmax())]
            regions = LAYOUT_REGIONS[list(LAYOUTS)[int(found["layout"][i])]]
            pair = [things[region] for region in regions]
            rows.append(
                [
                    ground != WHITE and is_held_out("ground", things["all"], ground),
                    self.sprites.color(shape) != hue and is_held_out("hue", self.sprites.sprites[shape].thing, hue),
                    len(regions) > 1 and is_held_out("count", pair[0], str(len(regions))),
                    len(regions) == 2 and is_held_out("pair", *pair),
                ]
            )
        return torch.tensor(rows)

    def _sprite(self, entry: int) -> Sprite:
        return self.sprites.sprites[self._order[entry]]


@EXTRACTORS.register("sprites", bundled=bundled_folder(), obtain="a folder of sprites")
def load_sprites(location: Path, device: torch.device, expected_sha256: str | None = None) -> SpritesExtractor:
    """Opens a sprite set as an extractor that compares things by their pixels.

    Args:
        location: Folder of sprites, see `SpriteSet.load`.
        device: Not used: pixels are compared on the CPU.
        expected_sha256: Fingerprint that the set must have. Defaults to any.

    Raises:
        ExtractorFileError: The set has another fingerprint.
        ValueError: The folder holds no sprites.
    """
    del device
    return _opened("sprites", sprite_set(location), None, expected_sha256)


def _opened(
    name: str, sprites: SpriteSet, network: Extractor | None, expected_sha256: str | None = None
) -> SpritesExtractor:
    """Returns an extractor of a sprite set, with a network or by pixels."""
    fingerprint = sprites.fingerprint()
    if network is None and expected_sha256 not in (None, fingerprint):
        raise ExtractorFileError(f"the sprites have the fingerprint {fingerprint}, expected {expected_sha256}")
    record: dict[str, Any] = {"name": name, "sprites": len(sprites), "sprites_sha256": fingerprint}
    if network is None:
        record |= {"sha256": fingerprint, "pixels": CROP}
    else:
        record |= {"sha256": network.record["sha256"], "pixels": NETWORK_SIDE, "network": dict(network.record)}
    return SpritesExtractor(name=name, sprites=sprites, record=record, network=network)


def _compared_by(name: str, load: Callable[[Path, torch.device, str | None], Extractor]) -> None:
    """Registers an extractor of the bundled sprites with a network, which is read from the location."""

    def opener(location: Path, device: torch.device, expected_sha256: str | None = None) -> SpritesExtractor:
        return _opened(f"sprites-{name}", sprite_set(bundled_folder()), load(location, device, expected_sha256))

    spec = EXTRACTORS.spec(name)
    EXTRACTORS.register(f"sprites-{name}", file=spec.default_file, obtain=spec.source)(opener)


for _name, _load in (("mobilenet", load_mobilenet), ("clip", load_clip), ("ranker", load_ranker)):
    _compared_by(_name, _load)
