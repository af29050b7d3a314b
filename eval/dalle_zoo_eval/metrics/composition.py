"""Composition accuracy: whether an image has the things, colors, layout and style of its caption."""

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
"""Maximum longer side of a thing for which a place in the image is meaningful, pixels."""
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
    """Returns the share of images that match each part of the caption, with bootstrap intervals over prompts.

    Args:
        grounds: Share of each ground color in the border, (B, N, G).
        hues: Share of each hue in the saturated pixels of things, (B, N, U).
        layout: Index of the nearest layout, (B, N).
        boxes: Box of the thing in every region, pixels, (B, N, R, 4).
        things: Thing of the nearest sprite in every region, (B, N, R).
        shapes: Thing of the nearest sprite regardless of hue, (B, N, R).
        styles: Style of the nearest sprite, (B, N, R).
        targets: Content of each prompt, with the keys ``things`` and ``styles`` (region to name), ``ground``, ``hue``
            and ``layout`` (a name) and ``place`` (shares of the free space). All keys are optional.

    Returns:
        ``thing``, ``color``, ``layout`` and ``style``, for those that occur in a prompt, and ``all`` of them together.
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
    """Returns whether the share of a color is the largest and not 0, (N,)."""
    return (shares.argmax(-1) == index) & (shares.sum(-1) > 0)


def _is_placed(boxes: Tensor, place: Sequence[float]) -> Tensor:
    """Returns whether things are small and nearest to a place (start, middle or end along each axis), (N,)."""
    low, high = boxes[:, :2].float(), boxes[:, 2:].float()
    free = (SIZE - (high - low)).clamp(min=1)
    share = ((low / free) * 2).round() / 2
    return (share == torch.tensor(place)).all(1) & ((high - low).amax(1) <= SMALL)
