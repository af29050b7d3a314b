"""Composed images with captions: sprites placed, recolored, counted and paired on the fly.

```
sprites (SpriteSet) ─► Picker: things, colors, places by seed ─► kind (KINDS): Scene and caption ─► render ─► pixels
                            └─ is_held_out: combinations that training never sees
```
"""

from dalle_zoo.composition.composer import COMBINATIONS, Composed, Composer, CompositionConfig
from dalle_zoo.composition.kinds import KINDS, SHARES
from dalle_zoo.composition.picker import Picker, is_held_out
from dalle_zoo.composition.scene import Placed, Scene, render
from dalle_zoo.composition.sprites import Sprite, SpriteSet

__all__ = [
    "COMBINATIONS",
    "KINDS",
    "SHARES",
    "Composed",
    "Composer",
    "CompositionConfig",
    "Picker",
    "Placed",
    "Scene",
    "Sprite",
    "SpriteSet",
    "is_held_out",
    "render",
]
