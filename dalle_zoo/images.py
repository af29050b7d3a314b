"""Converts images between tensors and PIL, arranges them in grids, and saves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dalle_zoo.files import atomic_write, check_ending

# B images, H W pixels


def to_uint8(images: Tensor) -> Tensor:
    """Converts pixels in [0, 1], of any shape, to uint8 on the CPU. Values outside the range are clamped."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Converts pixels in [0, 1], (B, 3, H, W), to RGB images."""
    return [Image.fromarray(a) for a in to_uint8(images).permute(0, 2, 3, 1).numpy()]


def from_pil(image: Image.Image) -> Tensor:
    """Converts an image of any mode to float RGB pixels in [0, 1], (3, H, W)."""
    array = np.array(to_rgb(image), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, dB: pixels in [0, 1], (B, ...), to (B,). Equal images have 100 dB."""
    error = (images - reference).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def make_grid(images: Tensor, columns: int, pad: int = 2) -> Tensor:
    """Arranges images in a grid on a white background, row by row.

    Args:
        images: Pixels in [0, 1], (B, 3, H, W).
        columns: Number of images per row.
        pad: Space between images, and around all of them, in pixels. Defaults to 2.

    Returns:
        The grid, uint8 (3, H', W').
    """
    tiles = to_uint8(images)
    _, channels, height, width = tiles.shape
    rows = -(-len(tiles) // columns)
    shape = (channels, rows * (height + pad) + pad, columns * (width + pad) + pad)
    grid = torch.full(shape, 255, dtype=torch.uint8)
    for index, tile in enumerate(tiles):
        top, left = (pad + (index // columns) * (height + pad)), (pad + (index % columns) * (width + pad))
        grid[:, top : top + height, left : left + width] = tile
    return grid


def image_rows(*rows: Tensor) -> Tensor:
    """Arranges batches of equal size in a grid, one row per batch and one column per image.

    Args:
        rows: Batches, each with pixels in [0, 1], (B, 3, H, W).

    Returns:
        The grid, uint8 (3, H', W').
    """
    return make_grid(torch.cat([row.detach().float().cpu() for row in rows]), columns=len(rows[0]))


def save_png(image: Tensor | Image.Image, path: str | Path) -> Path:
    """Writes an image as PNG, atomically.

    Args:
        image: A uint8 tensor, (3, H, W), or a PIL image.
        path: Path of the file, which must end in ``.png``.

    Returns:
        The path.
    """
    path = Path(path)
    check_ending("path", path)
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG")
    return path


def caption_sheet(images: Tensor, captions: list[str], columns: int, scale: int = 2) -> Image.Image:
    """Renders the images of several captions in one image, with each caption above its images.

    Args:
        images: Pixels in [0, 1], (B, 3, H, W), grouped by caption, with the same number of images per caption.
        captions: Captions, in the order of the images. Long ones are truncated to the width of the sheet.
        columns: Maximum number of images per row.
        scale: Factor by which images are enlarged, in both directions. Defaults to 2.
    """
    from PIL import ImageDraw, ImageFont

    each = len(images) // len(captions)
    line = 18
    font = ImageFont.load_default(13)
    blocks = []
    for index, caption in enumerate(captions):
        grid = make_grid(images[index * each : (index + 1) * each], min(columns, each))
        image = Image.fromarray(grid.permute(1, 2, 0).numpy())
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        block = Image.new("RGB", (image.width, image.height + line), "white")
        block.paste(image, (0, line))
        draw = ImageDraw.Draw(block)
        while caption and draw.textlength(caption, font) > block.width - 8:
            caption = caption.removesuffix("…")[:-1] + "…" if len(caption) > 1 else ""
        draw.text((4, 2), caption, fill="black", font=font)
        blocks.append(block)
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block must not make the image unreadable
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB as a viewer displays it.

    Applies the EXIF rotation, composites transparency onto white, and scales (does not clip) 16-bit and float values
    to 8 bits.
    """
    image = _upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _wide_gray(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _wide_gray(image: Image.Image) -> Image.Image:
    """Converts grayscale of 16 bits (0 to 65535) or float (0 to 1 or, if any value is larger, 0 to 255) to 8 bits."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = 65535.0
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    return Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
