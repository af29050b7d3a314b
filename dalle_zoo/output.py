"""Result of a call of the pipeline."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle_zoo.image_settings import ImageSettings
from dalle_zoo.images import from_pil, make_grid, save_png, square_columns, to_pil
from dalle_zoo.paths import user_path
from dalle_zoo.values import as_integer

# B images, H W pixels, h w code grid


@dataclass(frozen=True)
class PipelineOutput:
    """Images with their scores, seeds and settings. Notebooks display it as a grid."""

    images: Any
    """Images, those of the first prompt first: a list of PIL images, an array (B, H, W, 3) or a tensor (B, 3, H, W) in
    [0, 1], or codes (B, h, w), depending on ``output_type``."""
    scores: Tensor | None = None
    """Score of every returned image, (B,), best first within a prompt: from the ranker, or the log-likelihood of given
    cells, see ``rerank``. None without reranking."""
    seeds: Tensor | None = None
    """Seed of every returned image, int64 (B,): the call with ``seed=seeds[k]`` generates image k again."""

    settings: list[ImageSettings] | None = None
    """Settings of every returned image."""

    def save(self, folder: str | Path) -> list[Path]:
        """Writes every image with its settings to a PNG file ``000.png``, ``001.png`` and so on.

        Args:
            folder: Folder; created if it does not exist. Files of the same names are replaced.

        Returns:
            Paths of the images.

        Raises:
            ValueError: The output holds codes, not images.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     [path.name for path in PipelineOutput(torch.zeros(2, 3, 64, 64)).save(folder)]
            ['000.png', '001.png']
        """
        images, folder = to_pil(self._pixels()), user_path(folder, "folder")
        settings: Sequence[ImageSettings | None] = self.settings or [None] * len(images)
        return [
            save_png(image, folder / f"{index:03d}.png", each)
            for index, (image, each) in enumerate(zip(images, settings, strict=True))
        ]

    def grid(self, columns: int | None = None) -> Image.Image:
        """Arranges the images in a grid.

        Args:
            columns: Images per row. Defaults to a nearly square grid.

        Raises:
            ValueError: The output holds codes, not images, or the number of columns is not positive.

        Example:
            >>> PipelineOutput(torch.zeros(6, 3, 64, 64)).grid(columns=3).size
            (200, 134)
        """
        images = self._pixels()
        most = square_columns(len(images)) if columns is None else as_integer("columns", columns, least=1)
        return Image.fromarray(make_grid(images, min(most, len(images))).permute(1, 2, 0).numpy())

    def _pixels(self) -> Tensor:
        """Returns pixels in [0, 1], (B, 3, H, W)."""
        if isinstance(self.images, list):
            return torch.stack([from_pil(image) for image in self.images])
        if isinstance(self.images, np.ndarray):
            return torch.from_numpy(self.images).permute(0, 3, 1, 2)
        if self.images.ndim != 4:
            raise ValueError('the output holds codes: decode them with pipe.decode, or omit output_type="latent"')
        pixels: Tensor = self.images
        return pixels

    def _repr_png_(self) -> bytes | None:
        """Returns the grid as PNG, for notebooks; None for codes."""
        if isinstance(self.images, Tensor) and self.images.ndim != 4:
            return None
        buffer = io.BytesIO()
        self.grid().save(buffer, format="PNG")
        return buffer.getvalue()
