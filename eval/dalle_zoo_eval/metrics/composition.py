"""Whether an image shows the scene that its caption asks for: color, layout, things and style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_zoo.composition.sprites import SIZE
from dalle_zoo_eval.extractors.sprites import identifier
from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import Estimate, bootstrapped
from dalle_zoo_eval.scene_pixels import GROUND_NAMES, HUE_NAMES, LAYOUTS, REGIONS

# B prompts, N images of a prompt, R regions, G grounds, U hues

Target = Mapping[str, Any]
SETS = ("real", "reconstructed", "generated", "candidates", "shuffled")
SMALL = 46
"""Longer side of a thing that is small enough to be somewhere in particular, pixels."""
_REGIONS = {name: number for number, name in enumerate(REGIONS)}


@METRICS.register(
    "composition",
    label="composition",
    unit="%",
    format=".1f",
    section="Composition",
    parts={
        "all": "everything that is asked for",
        "thing": "the right thing",
        "color": "the right color",
        "layout": "the right number or places",
        "style": "the right style",
    },
    images=SETS,
    paired=True,
    every=True,
    by_group=True,
    relative_to="reconstructed",
    interval="bootstrap over the prompts",
)
def composition(
    grounds: Tensor,
    hues: Tensor,
    layout: Tensor,
    boxes: Tensor,
    things: Tensor,
    shapes: Tensor,
    styles: Tensor,
    targets: Sequence[Target],
) -> dict[str, Estimate]:
    """Returns the share of images in which each part of the caption is right, with bootstrap intervals over prompts.

    Args:
        grounds: Shares of the border, (B, N, G).
        hues: Shares of the saturated pixels of things, (B, N, U).
        layout: Index of the nearest layout, (B, N).
        boxes: Boxes of the things of every region, (B, N, R, 4).
        things: Thing of the nearest sprite of every region, (B, N, R).
        shapes: The same whatever the hue, (B, N, R).
        styles: Style of the nearest sprite, (B, N, R).
        targets: What each prompt asks for; a part that no prompt asks for is left out. Keys: ``things`` and
            ``styles``, region to name; ``ground``, ``hue`` and ``layout``, a name; ``place``, shares of free space.

    Returns:
        ``thing``, ``color``, ``layout`` and ``style``, as far as the prompt states them, and ``all`` of them.
    """
    right: dict[str, list[Tensor]] = {}
    for i, target in enumerate(targets):
        found: dict[str, list[Tensor]] = {}
        seen = shapes if target.get("hue") else things
        for part, measured, wanted in (("thing", seen, "things"), ("style", styles, "styles")):
            for region, name in (target.get(wanted) or {}).items():
                found.setdefault(part, []).append(measured[i, :, _REGIONS[region]] == identifier(name))
        for key, measured, names in (("ground", grounds, GROUND_NAMES), ("hue", hues, HUE_NAMES)):
            if target.get(key):
                found.setdefault("color", []).append(_is_largest(measured[i], names.index(target[key])))
        if target.get("layout"):
            found.setdefault("layout", []).append(layout[i] == list(LAYOUTS).index(target["layout"]))
        if target.get("place"):
            found.setdefault("layout", []).append(_is_placed(boxes[i, :, _REGIONS["all"]], target["place"]))
        parts = {part: torch.stack(hits).all(0).double().mean() for part, hits in found.items()}
        together = torch.stack([hit for hits in found.values() for hit in hits]).all(0).double().mean()
        for part, share in {**parts, "all": together}.items():
            right.setdefault(part, []).append(share)
    return {part: bootstrapped(torch.stack(shares)) for part, shares in right.items()}


def _is_largest(shares: Tensor, index: int) -> Tensor:
    """Whether the share of a color is the largest one, and there is any; (N,)."""
    return (shares.argmax(-1) == index) & (shares.sum(-1) > 0)


def _is_placed(boxes: Tensor, place: Sequence[float]) -> Tensor:
    """Whether the things are small, and nearest to a place out of start, middle and end along both axes, (N,)."""
    low, high = boxes[:, :2].float(), boxes[:, 2:].float()
    free = (SIZE - (high - low)).clamp(min=1)
    share = ((low / free) * 2).round() / 2
    return (share == torch.tensor(place)).all(1) & ((high - low).amax(1) <= SMALL)
