"""A model zoo for DALL-E, "Zero-Shot Text-to-Image Generation" (arXiv 2102.12092)."""

from typing import TYPE_CHECKING, Any

from dalle_zoo.version import __version__

if TYPE_CHECKING:
    from dalle_zoo.pipeline import DallePipeline, load_model
    from dalle_zoo.zoo import list_models

__all__ = ["DallePipeline", "__version__", "list_models", "load_model"]

_HOMES = {
    "DallePipeline": "dalle_zoo.pipeline",
    "list_models": "dalle_zoo.zoo",
    "load_model": "dalle_zoo.pipeline",
}


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used, which keeps importing the package fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
