"""Similarity of images and captions by networks trained on human preferences, or by any CLIP."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.metrics.estimates import bootstrapped

# B pairs, d features

INTERVAL = "bootstrap over the captions"


@METRICS.register(
    "pick_score", extractor="pickscore", label="PickScore", format=".3f", source="Kirstain et al., 2023", least=500,
    interval=INTERVAL,
)  # fmt: skip
def pick_score(features: Tensor, text_features: Tensor) -> dict[str, float]:
    """Returns the mean cosine times 100, with its interval.

    The factor replaces the learned temperature of the network, whose published value is 100 as well. The mean over the
    captions is not clipped.

    Reference: Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (Kirstain et al., 2023).

    Args:
        features: Features of the images, (B, d); they need not be unit vectors.
        text_features: Features of the captions, (B, d); row i belongs to image i.

    Raises:
        ValueError: The shapes differ, or there are no images.

    Example:
        >>> import torch
        >>> images, captions = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> pick_score(images, captions)["value"], pick_score(images, -captions)["value"]
        (100.0, -100.0)
    """
    return _mean_logit(features, text_features)


@METRICS.register(
    "clip_logit", label="caption cosine x 100", format=".3f", source="Radford et al., 2021", least=500,
    interval=INTERVAL,
)  # fmt: skip
def clip_logit(features: Tensor, text_features: Tensor) -> dict[str, float]:
    """Returns `pick_score` in the features of any other CLIP folder, such as that of HPS v2."""
    return _mean_logit(features, text_features)


def paired_cosines(features: Tensor, text_features: Tensor) -> Tensor:
    """Returns the cosine of each image with its caption, float64 (B,); errors as in `pick_score`."""
    if features.ndim != 2 or features.shape != text_features.shape or not len(features):
        raise ValueError(
            "features of images and captions must both be (B, d) with B of at least 1, got "
            f"{tuple(features.shape)} and {tuple(text_features.shape)}"
        )
    return (F.normalize(features.double(), dim=1) * F.normalize(text_features.double(), dim=1)).sum(1)


def _mean_logit(features: Tensor, text_features: Tensor) -> dict[str, float]:
    return bootstrapped(100 * paired_cosines(features, text_features)).annotated()
