"""FD-DINOv2: the Fréchet distance in the features of DINOv2."""

from __future__ import annotations

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.frechet import INTERVAL, LEAST, FrechetBase


@METRICS.register(
    "fd_dinov2", extractor="dinov2", lower_is_better=True, label="FD-DINOv2", format=".2f", sweep=True,
    source="Stein et al., 2023", least=LEAST, interval=INTERVAL,
)  # fmt: skip
class FrechetDINOv2Distance(FrechetBase):
    """Fréchet distance in the features of DINOv2 ViT-L/14, which agrees better with human votes than the FID.

    Reference: Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion models
    (Stein et al., 2023).
    """
