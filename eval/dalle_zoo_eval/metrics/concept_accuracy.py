"""Concept accuracy: whether the real images nearest to an image have its concept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo_eval.metrics.base import METRICS

# Q queries, G gallery, d features


def check(keys: Sequence[str], concepts: Sequence[str], *, ks: Sequence[int] = (1, 5)) -> None:
    """Raises `ValueError` unless every gallery image has a concept and a unique key.

    Args:
        keys: Keys of the gallery.
        concepts: Concept of each key; empty if it has none.
        ks: Numbers of neighbors.
    """
    nameless = [key for key, concept in zip(keys, concepts, strict=True) if not concept]
    if nameless:
        raise ValueError(f"{len(nameless)} keys name no concept, such as {nameless[0]!r}: expected <concept>_<style>")
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} keys are in more than one group, such as {repeated[0]!r}: rename them")
    if not ks or not 1 <= min(ks) <= max(ks) < len(keys):
        raise ValueError(f"ks must be in 1..{len(keys) - 1} (the gallery), got {list(ks)}")


@METRICS.register(
    "concept_accuracy",
    extractor="mobilenet",
    label="concept accuracy",
    unit="%",
    format=".1f",
    section="Concept accuracy",
    paired=True,
    reference="all",
    bars=True,
    images=("real", "reconstructed", "generated", "candidates", "shuffled"),
    check=check,
)
def concept_accuracy(
    features: Tensor,
    keys: Sequence[str],
    concepts: Sequence[str],
    real_features: Tensor,
    real_keys: Sequence[str],
    real_concepts: Sequence[str],
    *,
    ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Returns the share of queries with an image of their concept among the k nearest gallery images, for every k.

    Images are compared by cosine similarity. The gallery image with the key of the query is excluded.

    Args:
        features: Features of the queries, (Q, d); they need not be unit vectors.
        keys: Key of the real image of each query.
        concepts: Concept of each query.
        real_features: Features of the gallery, (G, d).
        real_keys: Keys of the gallery, all different.
        real_concepts: Concepts of the gallery.
        ks: Numbers of neighbors, less than G. Defaults to 1 and 5.

    Returns:
        Share for every k, under ``top1``, ``top5`` and so on.

    Raises:
        ValueError: As for `check`, or features, keys and concepts differ in number.

    Example:
        >>> keys, concepts = ["cat_1", "dog_1", "cat_2", "dog_2"], ["cat", "dog", "cat", "dog"]
        >>> gallery = torch.eye(2).repeat(2, 1)  # cats and dogs
        >>> concept_accuracy(gallery[:2], keys[:2], concepts[:2], gallery, keys, concepts, ks=[1])
        {'top1': 1.0}
    """
    check(real_keys, real_concepts, ks=ks)
    if not len(features) == len(keys) == len(concepts):
        raise ValueError(
            f"features, keys and concepts must be one per query, got {len(features)}, {len(keys)} and {len(concepts)}"
        )
    place = {key: index for index, key in enumerate(real_keys)}
    names = {name: index for index, name in enumerate(dict.fromkeys(real_concepts))}
    own = torch.tensor([place.get(key, -1) for key in keys])
    wanted = torch.tensor([names.get(concept, -1) for concept in concepts])
    known = torch.tensor([names[concept] for concept in real_concepts])
    similarity = F.normalize(features, dim=-1) @ F.normalize(real_features, dim=-1).t()
    rows = (own >= 0).nonzero().flatten()
    similarity[rows, own[rows]] = -torch.inf
    nearest = known[similarity.topk(max(ks), dim=1).indices] == wanted[:, None]
    return {f"top{k}": float(nearest[:, :k].any(1).double().mean()) for k in ks}
