"""Convolutional attention of ruDALL-E v3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.conv import kernel_reach
from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("conv_clamped")
def conv_clamped(layout: TextImageLayout, *, kernel: int = 11) -> MaskMod:
    """Attends to the causal half of a K x K neighborhood, which ends at the borders of the grid.

    ``|r_q - r_k| <= p`` and ``|c_q - c_k| <= p`` with rows r, columns c and ``p = (K - 1) / 2``. The paper's ``conv``
    wraps around at the side borders instead.

    Reference: ruDALL-E, https://github.com/ai-forever/ru-dalle, ``hf_version`` v3 (Malevich, Surrealist, Kandinsky).

    Args:
        layout: Positions of text and image.
        kernel: Side K of the neighborhood, odd. Defaults to 11, as in ruDALL-E.

    Raises:
        ValueError: ``kernel`` is even or not positive.

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("conv_clamped(kernel=3)", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[0, 0, 0],
                [1, 1, 1],
                [1, 1, 0]], dtype=torch.int32)
    """
    reach, width = kernel_reach("conv_clamped", kernel), layout.width

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        rows, columns = query // width - key // width, query % width - key % width
        return (rows <= reach) & (-reach <= columns) & (columns <= reach)

    return text_then_image(layout, image_rule)
