"""CLIP score: how well images fit their captions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.metrics.base import METRICS

# B pairs, d features


@METRICS.register("clip_score", extractor="clip", label="CLIP score")
def clip_score(features: Tensor, text_features: Tensor) -> float:
    """Returns the mean cosine times 100, at least 0, as torchmetrics' ``CLIPScore`` defines it.

    This is *not* the CLIPScore of CLIPScore: A Reference-free Evaluation Metric for Image Captioning (Hessel et al.,
    2021), which is the mean of ``2.5 max(cosine, 0)``: for positive cosines, this number divided by 40.

    Args:
        features: (B, d); need not be unit vectors.
        text_features: (B, d), row i for the caption of image i.

    Returns:
        Between 0 and 100.

    Raises:
        ValueError: The two do not pair up, or there are none.
    """
    if features.ndim != 2 or features.shape != text_features.shape or not len(features):
        raise ValueError(
            "features of images and captions must be (B, d) alike and not none, got "
            f"{tuple(features.shape)} and {tuple(text_features.shape)}"
        )
    cosine = (F.normalize(features.double(), dim=1) * F.normalize(text_features.double(), dim=1)).sum(1)
    return max(0.0, 100 * float(cosine.mean()))
