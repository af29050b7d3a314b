"""Convolutional attention to the cells above and to the left, as DALLE-pytorch has it since version 1.5."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("conv_quadrant")
def conv_quadrant(layout: TextImageLayout, *, kernel: int = 5, dilation: int = 1) -> MaskMod:
    """Reads a K x K neighborhood whose last corner it is: cells above and to the left.

    ``r`` rows up and ``c`` columns left, both one of ``0, s, ..., (K - 1) s`` with the dilation ``s``; what leaves
    the grid is left out. Unlike the paper's `conv` it reads nothing to the right of its own column.

    Reference: https://github.com/lucidrains/DALLE-pytorch, attention type ``conv_like``.

    Args:
        layout: Where text and image stand.
        kernel: Side K of the neighborhood.
        dilation: Distance s of the cells that are read.

    Raises:
        ValueError: ``kernel`` or ``dilation`` is not positive.
    """
    for name, value in (("kernel", kernel), ("dilation", dilation)):
        if value < 1:
            raise ValueError(f"{name} of the conv_quadrant mask must be at least 1, got {value}")

    def near(distance: Tensor) -> Tensor:
        return (distance >= 0) & (distance < kernel * dilation) & (distance % dilation == 0)

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        return near(query // layout.width - key // layout.width) & near(query % layout.width - key % layout.width)

    return text_then_image(layout, image_rule)
