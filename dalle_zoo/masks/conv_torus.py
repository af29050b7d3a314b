"""Convolutional attention of ruDALL-E v2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.conv import kernel_reach
from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("conv_torus")
def conv_torus(layout: TextImageLayout, *, kernel: int = 11) -> MaskMod:
    """Attends to the causal half of a K x K neighborhood on a grid that wraps around both ways.

    ``(r_q - r_k + p) mod H < K`` and ``(c_q - c_k + p) mod W < K`` with rows r, columns c and ``p = (K - 1) / 2``. So
    the last p rows also attend to the first rows, and a neighborhood that wraps around sideways stays in its row,
    where the paper's ``conv`` continues in the row above.

    Reference: ruDALL-E, https://github.com/ai-forever/ru-dalle, ``hf_version`` v2 (Malevich v2, Emojich).

    Args:
        layout: Positions of text and image.
        kernel: Side K of the neighborhood, odd. Defaults to 11, as in ruDALL-E.

    Raises:
        ValueError: ``kernel`` is even or not positive.

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("conv_torus(kernel=3)", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[1, 1, 1],
                [1, 1, 1],
                [1, 1, 0]], dtype=torch.int32)
    """
    reach, height, width = kernel_reach("conv_torus", kernel), layout.height, layout.width

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        rows, columns = query // width - key // width, query % width - key % width
        return ((rows + reach) % height < kernel) & ((columns + reach) % width < kernel)

    return text_then_image(layout, image_rule)
