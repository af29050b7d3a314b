"""Column attention of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("column")
def column(layout: TextImageLayout) -> MaskMod:
    """Attends to itself and to all cells above it in the same column.

    ``o mod W = 0`` with ``o = query - key >= 0``. Figure 11 (c) is the same mask on image states
    in column-major order, where it is block-diagonal.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix B.1,
    figures 11 (b) and (c).

    Args:
        layout: Positions of text and image.

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("column", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[0, 1, 0],
                [0, 1, 0],
                [0, 1, 0]], dtype=torch.int32)
    """

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        return (query - key) % layout.width == 0

    return text_then_image(layout, image_rule)
