"""Decodes image files to RGB as image viewers show them."""

from __future__ import annotations

import io
import re
import warnings

from PIL import Image, UnidentifiedImageError

from dalle_zoo.images import to_rgb

MAX_PIXELS = 178_956_970
"""Images with more are refused: half a gigabyte once decoded, Pillow's line for an attack."""

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Decoders that may run on external bytes; Pillow has others, such as EPS, that start programs."""


class CorruptImageError(ValueError):
    """Bytes that are no image, are truncated, or would take too much memory."""


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image file.

    The EXIF rotation is applied, transparency is put on white, 16-bit values are scaled (not
    clipped) to 8 bits, and of an animation the first frame is taken. Palette, gray and CMYK
    images become RGB.

    Args:
        data: Contents of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF file.

    Returns:
        An RGB image, fully loaded.

    Raises:
        CorruptImageError: Not an image, truncated, or more than `MAX_PIXELS` pixels.
    """
    # Pillow warns of broken EXIF blocks and of large images: the first is harmless, the second
    # checked here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise CorruptImageError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
                image.load()
                return to_rgb(image)
        except CorruptImageError:
            raise
        except UnidentifiedImageError as error:
            raise CorruptImageError("not a readable image (of no known format, or damaged)") from error
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            # Reasons are stored in code shards: an address in memory would make each encoding another one.
            reason = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
            raise CorruptImageError(f"not a readable image ({type(error).__name__}: {reason})") from error


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]
