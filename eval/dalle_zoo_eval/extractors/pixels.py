"""Features without a network: the image scaled to 8 x 8 pixels.

They represent only the layout of colors. Distances in them reveal sets that differ in colors, crops or scales, and are
available on every machine, but they do not depend on the objects in the images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.extractors.base import EXTRACTORS, ExtractorFileError, check_images, exact_float32

# B images, H W pixels

SIDE = 8
"""Side to which images are scaled, pixels: 192 features."""
RESIZE = "area"
FINGERPRINT = hashlib.sha256(f"{SIDE} x {SIDE} pixels, {RESIZE}, RGB in [0, 1]".encode()).hexdigest()
"""Replaces the sha256 of weights."""


@dataclass(frozen=True, kw_only=True)
class PixelExtractor:
    """Images scaled to 8 x 8 pixels."""

    name: str
    record: Mapping[str, str | int]

    def prepare(self, images: Tensor) -> Tensor:
        """Returns the images unchanged."""
        return images

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Maps uint8 (B, 3, H, W) to ``features`` in [0, 1], (B, 192)."""
        check_images(images)
        with exact_float32(torch.device("cpu")):
            scaled = F.interpolate(images.cpu().float() / 255, (SIDE, SIDE), mode=RESIZE)
            return {"features": scaled.flatten(1)}


@EXTRACTORS.register("pixels", bundled=Path(__file__), obtain="nothing: it is in the package")
def load_pixels(location: Path, device: torch.device, expected_sha256: str | None = None) -> PixelExtractor:
    """Opens the extractor.

    Args:
        location: Not used, since there is no file.
        device: Not used, since pixels are averaged on the CPU.
        expected_sha256: `FINGERPRINT`, or None for any.

    Raises:
        ExtractorFileError: Another fingerprint is expected.
    """
    del location, device
    if expected_sha256 not in (None, FINGERPRINT):
        raise ExtractorFileError(f"pixels has the fingerprint {FINGERPRINT}, expected {expected_sha256}")
    record: dict[str, str | int] = {
        "name": "pixels", "title": "8 x 8 pixels", "sha256": FINGERPRINT, "pixels": SIDE, "resize": RESIZE
    }  # fmt: skip
    return PixelExtractor(name="pixels", record=record)
