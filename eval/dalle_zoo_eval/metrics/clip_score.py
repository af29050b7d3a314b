"""CLIP score: how well images fit their captions."""

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
        features: (B, d); need not be unit vectors.
        text_features: (B, d), row i for the caption of image i.

    Returns:
        Between 0 and 100.

    Raises:
        ValueError: The two do not pair up, or there are none.
    """
    found = bootstrapped(100 * paired_cosines(features, text_features))
    return Estimate(*(max(0.0, number) for number in found)).annotated()
