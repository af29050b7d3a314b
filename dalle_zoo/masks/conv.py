"""Convolutional attention of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dalle_zoo.masks.layout import MASKS, MaskMod, TextImageLayout, text_then_image

if TYPE_CHECKING:
    from torch import Tensor


@MASKS.register("conv")
def conv(layout: TextImageLayout, *, kernel: int = 11) -> MaskMod:
    """Attends to the causal half of a K x K neighborhood, which wraps around at the side borders.

    ``(o + p) mod W < K`` and ``o < (p + 1) W``, with ``o = query - key >= 0`` and
    ``p = (K - 1) / 2``. In each of the ``p + 1`` bands of W offsets, cells that leave the kernel on
    the left come back at the far end: the illustrated case (W = 4, K = 3) has the offsets 0, 1, 3, 4,
    5 and 7, where a centered kernel would lack the 7.

    On a grid no wider than the kernel (W <= K) the first condition always holds: the mask is the
    band of the last ``(p + 1) W`` cells.

    Reference: Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), appendix B.1,
    figure 11 (d).

    Args:
        layout: Positions of text and image.
        kernel: Side K of the neighborhood, odd. Defaults to 11, as in the paper's model.

    Raises:
        ValueError: ``kernel`` is even or not positive.

    Example:
        >>> from dalle_zoo.masks import Mask, TextImageLayout
        >>> mask = Mask.from_spec("conv(kernel=3)", TextImageLayout(text=1, height=3, width=3))
        >>> mask.dense()[8, 1:].reshape(3, 3).int()  # the keys of the cell in the middle of the last row
        tensor([[0, 0, 1],
                [1, 1, 1],
                [1, 1, 0]], dtype=torch.int32)
    """
    reach = kernel_reach("conv", kernel)

    def image_rule(query: Tensor, key: Tensor) -> Tensor:
        offset = query - key
        near_column = (offset + reach) % layout.width < kernel
        return near_column & (offset < (reach + 1) * layout.width)

    return text_then_image(layout, image_rule)


def kernel_reach(mask: str, kernel: int) -> int:
    """Number of cells that a centered kernel reaches to either side, ``p = (K - 1) / 2``.

    Raises:
        ValueError: ``kernel`` is even or not positive.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"kernel of the {mask} mask must be odd and at least 1, got {kernel}: try kernel={max(kernel, 0) + 1}"
        )
    return (kernel - 1) // 2
