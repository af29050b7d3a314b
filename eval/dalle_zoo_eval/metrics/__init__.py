"""Metrics: torchmetrics `Metric`s over pure functions of features, without networks or files.

docs/evaluate/metrics.md states whose implementation each metric uses and why, and explains their inputs.

A new metric is one file with ``@METRICS.register(...)`` above a pure function or a torchmetrics class, and one import
line here. The names of its parameters select its inputs. Other distributions use the entry-point group
``dalle_zoo.metrics``. ``METRICS["kid"]()`` also works in any training loop: ``metric.update(features=x, real=True)``,
``metric.compute()``.
"""

from dalle_zoo_eval.metrics import (  # noqa: F401 (they register themselves)
    bits_per_token,
    caption_match,
    clip_score,
    cmmd,
    codebook_use,
    composition,
    concept_accuracy,
    density_coverage,
    distinct_images,
    fd_dinov2,
    frechet,
    inception_score,
    kid,
    precision_recall,
    psnr,
    r_precision,
    retrieval,
    seen_combinations,
    vendi,
)
from dalle_zoo_eval.metrics.base import METRICS, MetricSpec

__all__ = ["METRICS", "MetricSpec"]
