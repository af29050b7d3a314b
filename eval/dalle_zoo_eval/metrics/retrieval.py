"""Retrieval accuracy: captions by images, and images by captions."""

from __future__ import annotations

from torch import Tensor

from dalle_zoo.models.ranker import retrieval_accuracy
from dalle_zoo_eval.metrics.base import METRICS


@METRICS.register(
    "retrieval",
    extractor="ranker",
    label="ranker",
    unit="%",
    format=".1f",
    section="Retrieval",
    parts={
        f"{way}_top{k}": f"{label}, top {k}"
        for way, label in (("image_to_text", "image to caption"), ("text_to_image", "caption to image"))
        for k in (1, 5)
    },
    images=("real",),
)
def retrieval(features: Tensor, text_features: Tensor) -> dict[str, float]:
    """Returns `retrieval_accuracy` among all images and captions in both directions, for k = 1 and 5.

    Args:
        features: Features of the images, unit vectors (B, d).
        text_features: Features of the captions, unit vectors (B, d).

    Example:
        >>> import torch
        >>> found = retrieval(torch.eye(6), torch.eye(6).roll(1, 0))  # each caption belongs to another image
        >>> found["image_to_text_top1"]
        0.0
    """
    return retrieval_accuracy(features, text_features)
