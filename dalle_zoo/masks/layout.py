"""Positions of the stream, the declaration of a mask, and the registry of masks.

A mask is declared once, as a function of positions, in one small file. `dalle_zoo.masks.plan.Mask` derives everything
else from that function.

```
positions   0 ........ T-1 | T .................. T+N-1
            text           | image, raster order, N = height * width
```
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Concatenate, TypeAlias

from dalle_zoo.registry import Registry
from dalle_zoo.values import check_integers

if TYPE_CHECKING:  # looking up names and specs does not import torch
    from torch import Tensor

# T text positions, W width of the grid, N image positions, q query and k key positions, o = q - k

MaskMod: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""``mod(query, key)``: whether query positions may attend to key positions.

Both arguments are int64 tensors that broadcast; the result is a bool tensor of the broadcast shape. The function may
use only arithmetic and comparisons of the two: no branches on their values, and no other tensors.
"""


@dataclass(frozen=True)
class TextImageLayout:
    """Positions of text and image in the stream, 0 .. ``length`` - 1.

    Args:
        text: Text positions T, padding included (256 in the paper).
        height: Rows of the image grid (32 in the paper).
        width: Columns of the image grid W (32 in the paper).

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below 1.

    Example:
        >>> layout = TextImageLayout(text=6, height=4, width=4)
        >>> layout.image, layout.length
        (16, 22)
    """

    text: int
    height: int
    width: int

    def __post_init__(self) -> None:
        check_integers(self, "text", "height", "width")

    @property
    def image(self) -> int:
        """Image positions N = height * width."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """All positions, T + N."""
        return self.text + self.image


MaskFactory: TypeAlias = Callable[Concatenate[TextImageLayout, ...], MaskMod]
"""``factory(layout, **options) -> MaskMod``; options are integers passed by keyword.

The first line of its docstring explains the mask in plots and listings.
"""

MASKS: Registry[MaskFactory] = Registry("attention mask", group="dalle_zoo.masks")


def text_then_image(layout: TextImageLayout, image_rule: MaskMod) -> MaskMod:
    """Builds a mask from a rule for image-to-image attention; the rest is common to all masks of the paper.

    Text attends to text causally and never to the image. The image attends to all text, including padding, and
    causally to the image cells that ``image_rule`` selects (appendix B.1, figure 11).

    Args:
        layout: Positions of text and image.
        image_rule: Which image cells (raster indices 0 .. N - 1) attend to which. It need not be
            causal. Its result may depend on the columns of the two cells and on the number of rows
            between them, as with every rule of offsets, but not on the rows themselves. So pairs
            can be counted without an N x N matrix. `Mask.dense` checks this.

    Example:
        >>> import torch
        >>> mod = text_then_image(TextImageLayout(1, 1, 2), lambda query, key: query == key)
        >>> mod(torch.arange(3)[:, None], torch.arange(3)).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    text = layout.text

    def mod(query: Tensor, key: Tensor) -> Tensor:
        # If an index passed to the rule is negative, its result is ignored: a text key needs no rule,
        # and an image key is in the future of every text query.
        return (key <= query) & ((key < text) | image_rule(query - text, key - text))

    mod.repeats_by_row = True  # type: ignore[attr-defined]  # read by `Mask`
    return mod
