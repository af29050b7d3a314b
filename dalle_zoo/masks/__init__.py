"""Attention masks: which positions attend to which, declared once per pattern.

The registry `MASKS` maps a name to the function that declares the mask on a layout. To add a mask, write a file in
this folder with a factory under ``@MASKS.register("name")`` and import it here; a third party adds an entry point in
the group ``dalle_zoo.masks``. Plots, decoding, cost and the contract tests are derived from the declaration.

| name | an image cell attends to, in addition to all text | paper |
|---|---|---|
| ``full`` | every earlier cell | |
| ``row`` | the previous W cells | figure 11 (a) |
| ``column`` | the cells above | figure 11 (b, c) |
| ``conv`` | a causal neighborhood that wraps round | figure 11 (d) |
| ``row_same`` | the cells before it in its row | not in the paper: DALLE-pytorch |
| ``conv_clamped`` | a causal neighborhood that ends at the borders | not in the paper: ruDALL-E, DALLE-pytorch |
| ``conv_quadrant`` | a neighborhood above and to the left | not in the paper: DALLE-pytorch |
| ``conv_torus`` | a causal neighborhood that wraps round both ways | not in the paper: ruDALL-E v2 |
"""

from dalle_zoo.masks.column import column
from dalle_zoo.masks.conv import conv
from dalle_zoo.masks.conv_clamped import conv_clamped
from dalle_zoo.masks.conv_quadrant import conv_quadrant
from dalle_zoo.masks.conv_torus import conv_torus
from dalle_zoo.masks.full import full
from dalle_zoo.masks.layout import (
    MASKS,
    MaskFactory,
    MaskMod,
    TextImageLayout,
    text_then_image,
)
from dalle_zoo.masks.plan import CachePlan, DecodeTable, Mask
from dalle_zoo.masks.plot import plot_masks
from dalle_zoo.masks.row import row
from dalle_zoo.masks.row_same import row_same
from dalle_zoo.masks.schedule import layer_masks
from dalle_zoo.masks.spec import MaskSpec

__all__ = [
    "MASKS",
    "CachePlan",
    "DecodeTable",
    "Mask",
    "MaskFactory",
    "MaskMod",
    "MaskSpec",
    "TextImageLayout",
    "column",
    "conv",
    "conv_clamped",
    "conv_quadrant",
    "conv_torus",
    "full",
    "layer_masks",
    "plot_masks",
    "row",
    "row_same",
    "text_then_image",
]
