"""Convolutional attention to the cells above and to the left, as in DALLE-pytorch since version 1.5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("conv_quadrant")
def conv_quadrant(layout: TextImageLayout, *, kernel: int = 5, dilation: int = 1) -> MaskMod:
    """Attends to a K x K neighborhood above and to the left; the query is its last corner.

    The cells are ``r`` rows up and ``c`` columns to the left, each of ``0, s, ..., (K - 1) s`` with the dilation
    ``s``; cells outside the grid are omitted. Unlike the paper's `conv`, it attends to no cell to the right of the
    query's column.

    Reference: https://github.com/lucidrains/DALLE-pytorch, attention type ``conv_like``.

    Args:
        layout: Positions of text and image.
        kernel: Side K of the neighborhood. Defaults to 5.
        dilation: Distance s between neighboring cells of the kernel. Defaults to 1.

    Raises:
        ValueError: ``kernel`` or ``dilation`` is not positive.

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("conv_quadrant(kernel=3)", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 0]], dtype=torch.int32)
    """
    for name, value in (("kernel", kernel), ("dilation", dilation)):
        if value < 1:
            raise ValueError(f"{name} of the conv_quadrant mask must be at least 1, got {value}")

    def near(distance: Tensor) -> Tensor:
        return (distance >= 0) & (distance < kernel * dilation) & (distance % dilation == 0)

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        return near(query // layout.width - key // layout.width) & near(query % layout.width - key % layout.width)

    return text_then_image(layout, image_rule)
