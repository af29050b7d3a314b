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

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("full", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[1, 1, 1],
                [1, 1, 1],
                [1, 1, 0]], dtype=torch.int32)
    """

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    return text_then_image(layout, image_rule)
