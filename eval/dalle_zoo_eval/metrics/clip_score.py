"""CLIP score: similarity of images and captions."""

from __future__ import annotations

from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.caption_match import INTERVAL, paired_cosines
from dalle_zoo_eval.metrics.estimates import Estimate, bootstrapped

# B pairs, d features


@METRICS.register(
    "clip_score", extractor="clip", label="CLIP score", source="torchmetrics", least=500, interval=INTERVAL
)
def clip_score(features: Tensor, text_features: Tensor) -> dict[str, float]:
    """Returns the mean cosine times 100, at least 0, as torchmetrics' ``CLIPScore`` defines it, with its interval.

    This is *not* the CLIPScore of CLIPScore: A Reference-free Evaluation Metric for Image Captioning (Hessel et al.,
    2021), which is the mean of ``2.5 max(cosine, 0)``: for positive cosines, this number divided by 40.

    Args:
        features: Features of the images, (B, d); they need not be unit vectors.
        text_features: Features of the captions, (B, d); row i belongs to image i.

    Returns:
        Score in 0..100.

    Raises:
        ValueError: The shapes differ, or there are no images.

    Example:
        >>> import torch
        >>> images, captions = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> clip_score(images, captions)["value"], clip_score(images, -captions)["value"]
        (100.0, 0.0)
    """
    found = bootstrapped(100 * paired_cosines(features, text_features))
    return Estimate(*(max(0.0, number) for number in found)).annotated()
