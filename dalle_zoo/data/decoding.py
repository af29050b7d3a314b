"""Decodes image files to RGB as image viewers display them."""

from __future__ import annotations

import io
import re
import stat
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from dalle_zoo.images import to_rgb, upright

MAX_PIXELS = 2**26
"""Largest number of pixels of an image, such as 8192 x 8192. Decoding it takes at most 1.1 GB: Pillow uses 4 bytes per
pixel, and its WebP decoder has four copies."""
MAX_IMAGE_BYTES = 2**29
"""Largest size of an image file, in bytes."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded; others of Pillow, such as EPS, would start programs."""


_SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}


class CorruptImageError(ValueError):
    """The bytes are not an image, are truncated, or would take too much memory.

    Example:
        >>> decode_image(b"no image")
        Traceback (most recent call last):
        dalle_zoo.data.decoding.CorruptImageError: not a readable image (unknown format, or damaged)
    """


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image file.

    EXIF rotation is applied, transparent images are placed on white, 16-bit values are scaled (not clipped) to 8
    bits, and the first frame of an animation is used. Palette, gray and CMYK images are converted to RGB.

    Args:
        data: Contents of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF file.

    Returns:
        An RGB image, fully loaded.

    Raises:
        CorruptImageError: Not an image, truncated, or more than `MAX_PIXELS` pixels.

    Example:
        >>> decode_image(b"P6 2 1 255 abcdef").size
        (2, 1)
    """
    # Pillow warns about broken EXIF blocks, which are harmless, and about large images, which are checked here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
                width, height = image.size  # before any rotation
                if width * height > MAX_PIXELS:
                    raise CorruptImageError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
                image.load()
                return to_rgb(upright(image, in_place=True))
        except CorruptImageError:
            raise
        except UnidentifiedImageError as error:
            raise CorruptImageError("not a readable image (unknown format, or damaged)") from error
        except Exception as error:  # decoders raise many kinds of exceptions on damaged bytes
            # Reasons are stored in code shards: memory addresses would make every encoding differ.
            reason = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))
            raise CorruptImageError(f"not a readable image ({type(error).__name__}: {reason})") from error


def image_suffix(data: bytes) -> str:
    """Returns the suffix of an image file, without the dot, from its first bytes.

    Raises:
        CorruptImageError: The format is none of `FORMATS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
            return _SUFFIXES.get(str(image.format), str(image.format).lower())
    except Exception as error:  # as in `decode_image`
        raise CorruptImageError("not a readable image (of no known format, or damaged)") from error


def read_image(path: Path) -> bytes:
    """Reads an image file for `decode_image`.

    Raises:
        CorruptImageError: The file cannot be read, is no regular file, or has more than `MAX_IMAGE_BYTES`.
    """
    return read_file(path, MAX_IMAGE_BYTES)


def read_file(path: Path, limit: int) -> bytes:
    """Reads a regular file of at most ``limit`` bytes; raises `CorruptImageError` for any other."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CorruptImageError("not a file")  # opening a pipe would wait forever
        if status.st_size > limit:
            raise CorruptImageError(f"{status.st_size} bytes, more than {limit}")
        return path.read_bytes()
    except OSError as error:
        broken = path.is_symlink() and not path.exists()
        raise CorruptImageError("a broken link" if broken else f"cannot be read ({error.strerror or error})") from None


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
