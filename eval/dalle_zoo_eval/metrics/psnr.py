"""Peak signal-to-noise ratio of reconstructions."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio

from dalle_zoo_eval.metrics.base import METRICS


@METRICS.register(
    "psnr", label="reconstruction PSNR", unit="dB", format=".2f", section="Reconstruction", images=("reconstructed",)
)
class PSNR(PeakSignalNoiseRatio):
    """Computes ``-10 log10(mean squared error)`` per image and its mean over images, in dB, with torchmetrics.

    Example:
        >>> import torch
        >>> psnr, images = PSNR(), torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
        >>> psnr.update(images, images + 3)
        >>> round(psnr.compute().item(), 2)  # 20 log10(255 / 3)
        38.59
    """

    def __init__(self) -> None:
        super().__init__(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")

    def update(self, images: Tensor, reference_images: Tensor) -> None:
        """Adds images and their references, uint8 (B, 3, H, W) each."""
        super().update(images.float() / 255, reference_images.float() / 255)
