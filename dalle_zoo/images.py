"""Images as people look at them: tensors, PIL images and grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dalle_zoo.files import atomic_write, check_ending

# B images, H W pixels


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [0, 1] rounded to bytes, any shape."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pixels in [0, 1], (B, 3, H, W), as RGB images."""
    return [Image.fromarray(a) for a in to_uint8(images).permute(0, 2, 3, 1).numpy()]


def from_pil(image: Image.Image) -> Tensor:
    """An image of any mode as float RGB pixels in [0, 1], (3, H, W)."""
    array = np.array(to_rgb(image), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1).float() / 255


def make_grid(images: Tensor, columns: int, pad: int = 2) -> Tensor:
    """Tiles images on white, row by row: pixels in [0, 1], (B, 3, H, W) to uint8 (3, H', W')."""
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
    """Several batches one above the other, one column per image: uint8 (3, H', W')."""
    return make_grid(torch.cat([row.detach().float().cpu() for row in rows]), columns=len(rows[0]))


def save_png(image: Tensor | Image.Image, path: str | Path) -> Path:
    """Writes a uint8 (3, H, W) tensor or a PIL image as ``.png``; the file is written atomically."""
    path = Path(path)
    check_ending("path", path)
    if isinstance(image, Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    with atomic_write(path) as aside:
        image.save(aside, format="PNG")
    return path


def caption_sheet(images: Tensor, captions: list[str], columns: int, scale: int = 2) -> Image.Image:
    """Images below the caption they belong to.

    Args:
        images: Pixels in [0, 1], (B, 3, H, W), caption by caption, as many for each.
        captions: What the images show.
        columns: Images in a row.
        scale: Every pixel becomes a square of so many, so that small images can be seen.
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
    except Exception:  # a damaged EXIF block must not cost the image
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as a person expects to see it in RGB.

    Upright by its EXIF rotation, transparency on white, 16-bit and float values scaled (not clipped) to 8 bits.
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
    """Gray of 16 bits (0 .. 65535) or float (0 .. 1, else 0 .. 255) to 8 bits."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = 65535.0
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1 else 255.0
    return Image.fromarray((values * (255 / top)).round().clip(0, 255).astype(np.uint8))
