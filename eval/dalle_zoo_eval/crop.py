"""How an image is cropped to a square before it is measured."""

from typing import Literal

Crop = Literal["none", "center", "box"]
"""Part of an image that is taken."""
