"""Colors of grounds and things, and recoloring of sprites."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

# h w size of an image, in pixels; hues in degrees

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

GROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (222, 60, 50),
    "orange": (245, 150, 50),
    "yellow": (250, 215, 70),
    "green": (80, 175, 90),
    "blue": (70, 130, 230),
    "purple": (150, 90, 200),
    "pink": (250, 160, 195),
    "gray": (150, 150, 155),
    "black": (25, 25, 30),
}
"""RGB of named backgrounds; captions that name none have a white background."""
HUES = {"red": 2, "orange": 28, "yellow": 50, "green": 120, "blue": 218, "purple": 275, "pink": 330}
"""Hues of the colors of things, degrees."""

_NEAR = 45
"""Half-width of the range of hues that are recolored, degrees."""


def hsv(sprite: Pixels) -> tuple[Floats, Floats]:
    """Converts a sprite to HSV and opacity.

    Args:
        sprite: Premultiplied RGBA, uint8 (h, w, 4).

    Returns:
        HSV in 0..255, float32 (h, w, 3), and opacity in [0, 1], float32 (h, w).
    """
    alpha = sprite[..., 3].astype(np.float32) / np.float32(255)
    rgb = sprite[..., :3] / np.maximum(alpha, 1 / 255)[..., None]
    image = Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).convert("HSV")
    return np.asarray(image).astype(np.float32), alpha.astype(np.float32)


def dominant_hue(sprite: Pixels) -> tuple[float, float, float]:
    """Returns the dominant hue of a sprite.

    Args:
        sprite: Premultiplied RGBA, uint8 (h, w, 4).

    Returns:
        The hue in degrees, the share of the saturated area within 35 degrees of it, and the share of the sprite that
        is saturated. All are 0 if almost nothing is saturated.
    """
    values, alpha = hsv(sprite)
    weights = alpha * ((values[..., 1] > 70) & (values[..., 2] > 50))
    total = float(weights.sum())
    if total < 50:
        return 0.0, 0.0, 0.0
    degrees = values[..., 0] * 360 / 256
    bins = (degrees / 10).astype(np.int64) % 36
    histogram = np.bincount(bins.ravel(), weights.ravel(), 36)
    windows = sum(np.roll(histogram, shift) for shift in range(-3, 4))
    peak = int(np.argmax(windows))
    # The mean within the window, because several windows may hold the same hues.
    offset = (degrees - (peak * 10 + 5) + 180) % 360 - 180
    within = weights * (np.abs(offset) <= 35)
    hue = peak * 10 + 5 + float((offset * within).sum() / within.sum())
    return hue % 360, float(np.asarray(windows)[peak]) / total, total / float(alpha.sum())


def nearest_hue(degrees: float) -> str:
    """Returns the name in `HUES` of the nearest hue.

    Example:
        >>> nearest_hue(350), nearest_hue(60)
        ('red', 'yellow')
    """
    return min(HUES, key=lambda name: abs((HUES[name] - degrees + 180) % 360 - 180))


def is_single_hued(sprite: Pixels) -> bool:
    """Returns whether one hue dominates a sprite, so that recoloring changes the color of the thing."""
    _, share, saturated = dominant_hue(sprite)
    return share > 0.8 and saturated > 0.5


def recolored(sprite: Pixels, color: str) -> Pixels:
    """Replaces the dominant hue of a sprite; other hues, shading and highlights do not change.

    Args:
        sprite: Premultiplied RGBA, uint8 (h, w, 4).
        color: Name in `HUES`.

    Returns:
        Premultiplied RGBA, uint8 (h, w, 4).
    """
    dominant, _, _ = dominant_hue(sprite)
    values, alpha = hsv(sprite)
    hue, saturation, value = (values[..., i] for i in range(3))
    degrees = hue * 360 / 256
    offset = (degrees - dominant + 180) % 360 - 180
    near = (np.abs(offset) < _NEAR) & (saturation > 40)
    result = values.copy()
    # Half of the spread around the dominant hue is preserved, and with it the tint of shading.
    result[..., 0] = np.where(near, (offset * 0.5 + HUES[color]) % 360 * 256 / 360, hue)
    if color == "pink":  # a light red: less saturated and brighter
        result[..., 1] = np.where(near, saturation * 0.55, saturation)
        result[..., 2] = np.where(near, np.minimum(255, value * 0.6 + 105), value)
    elif color in ("red", "blue", "purple"):
        result[..., 1] = np.where(near, np.minimum(255, saturation * 0.8 + 20), saturation)
    height, width = alpha.shape
    image = Image.frombytes("HSV", (width, height), result.clip(0, 255).astype(np.uint8).tobytes())
    rgb = np.asarray(image.convert("RGB"))
    out = sprite.copy()
    out[..., :3] = (rgb * alpha[..., None] + 0.5).astype(np.uint8)
    return out
