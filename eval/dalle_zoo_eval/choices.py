"""Values that a protocol chooses from."""

from typing import Literal

Choice = Literal["one", "unique", "first"]
"""How captions are chosen."""
Crop = Literal["none", "center", "box"]
"""Part of an image that is taken."""
Seeds = Literal["prompt", "chunk"]
"""What the noise of an image is derived from."""
