from __future__ import annotations

import pytest

from dalle_zoo.composition import CompositionConfig, SpriteSet


@pytest.fixture(scope="session")
def sprites() -> SpriteSet:
    """The sprites of the bundled composition."""
    return CompositionConfig.load().open_sprites()
