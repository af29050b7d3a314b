"""R-precision: share of images whose own caption is the most similar among a hundred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.metrics.base import METRICS
from dalle_zoo_eval.moments import StatisticsError, in_batches

# B images, M mismatched captions, d features

CHUNK = 128
"""Number of images compared at once."""


@METRICS.register(
    "r_precision", extractor="ranker", label="R-precision", source="Xu et al., 2018", least=1000,
    interval="deviation over splits",
)  # fmt: skip
def r_precision(
    features: Tensor,
    text_features: Tensor,
    concepts: Sequence[str],
    *,
    mismatched: int = 99,
    splits: int = 10,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the share of images whose own caption is nearest by cosine, among random captions of other concepts.

    This follows AttnGAN and DM-GAN, except for the network (theirs is DAMSM) and for ties: if m other captions are as
    near as the own one, the image counts as 1 / (m + 1). Equal captions then do no harm, and a network that cannot
    distinguish captions scores at chance level.

    Reference: AttnGAN: Fine-Grained Text to Image Generation with Attentional Generative Adversarial Networks (Xu et
    al., 2018), section 4.

    Args:
        features: Features of the images, (B, d).
        text_features: Features of the captions, (B, d); row i belongs to image i.
        concepts: Concept of every image; its key if there are no concepts.
        mismatched: Number M of other captions, sampled without replacement for every image. Defaults to 99.
        splits: Number of consecutive splits, at most B. Defaults to 10.
        seed: Seed of the sampled captions. Defaults to 0.

    Returns:
        Mean and standard deviation (divided by ``splits``) over the splits, shares in [0, 1].

    Raises:
        ValueError: Features and concepts differ in number, or features have different lengths.
        StatisticsError: There are too few images, or too few captions of other concepts.

    Example:
        >>> features, concepts = torch.eye(4), ["robin", "wren", "owl", "crow"]
        >>> r_precision(features, features, concepts, mismatched=3, splits=1)
        (1.0, 0.0)
    """
    b = len(concepts)
    if features.ndim != 2 or features.shape != text_features.shape or len(features) != b:
        raise ValueError(
            "features of images and captions must both be (B, d), with one concept per row, got "
            f"{tuple(features.shape)}, {tuple(text_features.shape)} and {b} concepts"
        )
    if not 1 <= splits <= b:
        raise StatisticsError(f"splits must be in 1..{b} (the images), got {splits}")
    names, number = np.unique(np.asarray(concepts, dtype=object).astype(str), return_inverse=True)
    others = b - np.bincount(number)
    if mismatched < 1 or others.min() < mismatched:
        raise StatisticsError(
            f"{mismatched} captions of other concepts are needed, but concept {str(names[others.argmin()])!r} "
            f"leaves {others.min()}"
        )
    random = np.random.RandomState(seed)
    generated = torch.tensor([_sample(number, own, mismatched, random) for own in range(b)])
    images, texts = (F.normalize(f.double(), dim=1) for f in (features, text_features))
    hits = torch.cat([_hits(images, texts, generated, rows) for rows in in_batches(torch.arange(b), CHUNK)])
    shares = torch.stack([hits[i * b // splits : (i + 1) * b // splits].mean() for i in range(splits)])
    return float(shares.mean()), float(shares.std(correction=0))


def _sample(groups: np.ndarray, own: int, count: int, random: np.random.RandomState) -> list[int]:
    """Samples the indices of ``count`` distinct captions of other groups than that of caption ``own``."""
    generated: dict[int, None] = {}
    while len(generated) < count:
        numbers = random.randint(len(groups), size=count)
        generated |= dict.fromkeys(numbers[groups[numbers] != groups[own]].tolist())
    return list(generated)[:count]


def _hits(images: Tensor, texts: Tensor, generated: Tensor, rows: Tensor) -> Tensor:
    """Returns 1 if the own caption is nearest, 0 if it is not, and a fraction for ties, (rows,)."""
    candidates = torch.cat([rows[:, None], generated[rows]], 1)
    cosine = (images[rows, None] * texts[candidates]).sum(-1)
    best = cosine == cosine.max(1, keepdim=True).values
    return best[:, 0].double() / best.sum(1)
