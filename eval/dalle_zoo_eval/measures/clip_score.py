"""CLIP score: how well images fit their captions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

# B pairs, d features


def clip_score(image_features: Tensor, text_features: Tensor) -> float:
    """Mean cosine times 100, at least 0, as torchmetrics' ``CLIPScore`` defines it.

    This is *not* the CLIPScore of CLIPScore: A Reference-free Evaluation Metric for Image Captioning (Hessel et al.,
    2021), which is the mean of ``2.5 max(cosine, 0)``: for positive cosines, this number divided by 40.

    Args:
        image_features: (B, d); need not be unit vectors.
        text_features: (B, d), row i for the caption of image i.

    Returns:
        Between 0 and 100.

    Raises:
        ValueError: The two do not pair up, or there are none.
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape or not len(image_features):
        raise ValueError(
            "features of images and captions must be (B, d) alike and not none, got "
            f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    cosine = (F.normalize(image_features.double(), dim=1) * F.normalize(text_features.double(), dim=1)).sum(1)
    return max(0.0, 100 * float(cosine.mean()))
