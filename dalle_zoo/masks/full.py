"""Full causal attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("full")
def full(layout: TextImageLayout) -> MaskMod:
    """Attends to itself and to all earlier cells: plain causal attention, the baseline of the sparse masks.

    Args:
        layout: Positions of text and image.
    """

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    return text_then_image(layout, image_rule)
