"""Row attention of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("row")
def row(layout: TextImageLayout) -> MaskMod:
    """Attends to itself and to the previous W image cells, up to the one directly above.

    ``0 <= o <= W`` with ``o = query - key``. The mask is a band in raster order, not the query's own row: it
    continues across the left border of the image.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix B.1,
    figure 11 (a).

    Args:
        layout: Positions of text and image.

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("row", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[0, 0, 0],
                [0, 1, 1],
                [1, 1, 0]], dtype=torch.int32)
    """

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        return query - key <= layout.width

    return text_then_image(layout, image_rule)
