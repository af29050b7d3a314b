"""Options that a protocol chooses from."""

from typing import Literal

Choice = Literal["one", "unique", "first"]
"""How captions are chosen."""
Crop = Literal["none", "center", "box"]
"""How an image is cropped."""
Seeds = Literal["prompt", "chunk"]
"""What the seed of an image is derived from."""
