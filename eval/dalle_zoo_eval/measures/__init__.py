"""Scores as pure functions of statistics or features; no network, no file.

| module | score | from |
|---|---|---|
| `frechet` | Frechet distance, its value at infinity, its interval | moments, features |
| `inception_score` | Inception score | logits |
| `kernel` | kernel (Inception) distance | features of both sides |
| `manifold` | precision and recall | features of both sides |
| `clip_score` | CLIP score | features of images and captions |
| `r_precision` | R-precision | features of images and captions |

A distance is called FID or KID only where the features are Inception's; the caller knows.
"""

from dalle_zoo_eval.measures.clip_score import clip_score
from dalle_zoo_eval.measures.frechet import (
    Extrapolation,
    Reference,
    bootstrap_interval,
    frechet_distance,
    frechet_extrapolated,
)
from dalle_zoo_eval.measures.inception_score import inception_score
from dalle_zoo_eval.measures.kernel import kernel_distance
from dalle_zoo_eval.measures.manifold import precision_recall
from dalle_zoo_eval.measures.r_precision import r_precision

__all__ = [
    "Extrapolation",
    "Reference",
    "bootstrap_interval",
    "clip_score",
    "frechet_distance",
    "frechet_extrapolated",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "r_precision",
]
