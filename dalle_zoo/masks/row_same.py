"""Row attention within one row, as in DALLE-pytorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("row_same")
def row_same(layout: TextImageLayout) -> MaskMod:
    """Attends to itself and to the cells before it in the same row.

    Unlike the paper's `row`, it ends at the left border, so the first cell of a row attends to no other cell.

    Reference: https://github.com/lucidrains/DALLE-pytorch, attention type ``axial_row``.

    Args:
        layout: Positions of text and image.

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("row_same", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[0, 0, 0],
                [0, 0, 0],
                [1, 1, 0]], dtype=torch.int32)
    """

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        return query // layout.width == key // layout.width

    return text_then_image(layout, image_rule)
