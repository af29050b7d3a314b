"""Metrics: torchmetrics `Metric`s over pure functions of features; no network, no file.

| name | module | inputs | implementation |
|---|---|---|---|
| `fid`, `frechet` | `frechet` | features of both sides | own: exact streaming moments, interval, value at infinity |
| `is` | `inception_score` | logits | torch-fidelity |
| `kid` | `kid` | features of both sides | torch-fidelity |
| `precision`, `recall` | `precision_recall` | features of both sides | own: repeated images have distance 0 |
| `clip_score` | `clip_score` | features of images and captions | own: torchmetrics' takes images, not features |
| `r_precision` | `r_precision` | features of images and captions | own |
| `psnr` | `psnr` | images and references | torchmetrics |
| `codebook_use` | `codebook_use` | codes | own |
| `bits_per_token` | `bits_per_token` | negative log-likelihoods | own |
| `retrieval` | `retrieval` | features of images and captions | `dalle_zoo.models.ranker.retrieval_accuracy` |
| `concept_accuracy` | `concept_accuracy` | features, keys, concepts | own |
| `composition` | `composition` | what `sprites` measures, targets | own |
| `distinct_images` | `distinct_images` | thumbnails | own |
| `seen_combinations` | `seen_combinations` | held-out combinations that images show, targets | own |

A new metric is one file with ``@METRICS.register(...)``, above a pure function or a torchmetrics class, and one import
line here; other distributions use the entry-point group ``dalle_zoo.metrics``. Its parameters name what it needs, see
docs/evaluation.md. ``METRICS["kid"]()`` is a metric for any training loop:
``metric.update(features=x, real=True)``, ``metric.compute()``.
"""

from dalle_zoo_eval.metrics import (  # noqa: F401 (they register themselves)
    bits_per_token,
    clip_score,
    codebook_use,
    composition,
    concept_accuracy,
    distinct_images,
    frechet,
    inception_score,
    kid,
    precision_recall,
    psnr,
    r_precision,
    retrieval,
    seen_combinations,
)
from dalle_zoo_eval.metrics.base import METRICS, MetricSpec

__all__ = ["METRICS", "MetricSpec"]
