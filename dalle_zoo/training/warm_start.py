"""Starts the codes of stage 1 where images put them: an autoencoder first, then k-means of its features.

Not in the paper, which has three million steps to spread its codes. In the few thousand that two CPU cores can do,
the relaxation from random weights keeps a handful of codes and never wakes the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle_zoo.models.dvae import DVAE

# N vectors, D their size, K codes


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """How the codes are found before the relaxation begins."""

    steps: int
    """Steps as an autoencoder: the encoder's features reach the decoder through a linear map, without codes."""
    sharpness: float = 4.0
    """Logits fall by this much over the mean squared distance of a feature to its code."""
    gather: int = 32
    """Last steps of the autoencoder whose features k-means sees."""
    iterations: int = 12
    """Rounds of k-means."""

    def __post_init__(self) -> None:
        if not 1 <= self.gather <= self.steps:
            raise ValueError(f"gather must lie between 1 and steps {self.steps}, got {self.gather}")
        if self.sharpness <= 0 or self.iterations < 1:
            raise ValueError(
                f"sharpness must be above 0 and iterations at least 1, got {self.sharpness} and {self.iterations}"
            )


def kmeans(vectors: Tensor, count: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm; a center that no vector chose moves to a random vector.

    Args:
        vectors: (N, D), at least ``count``.
        count: Number of centers K.
        iterations: Rounds.
        generator: Source of the first centers and of those that move.

    Returns:
        Centers (K, D) and the mean squared distance of a vector to its center, a scalar.

    Raises:
        ValueError: There are fewer vectors than centers.
    """
    if len(vectors) < count:
        raise ValueError(f"k-means needs at least {count} vectors for as many codes, got {len(vectors)}: gather more")
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    centers = vectors[order[:count]].clone()
    for _ in range(iterations):
        nearest = _nearest(vectors, centers)
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
        sizes = torch.bincount(nearest, minlength=count)
        strays = torch.randint(len(vectors), (count,), generator=generator).to(vectors.device)
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], vectors[strays])
    distance = (vectors - centers[_nearest(vectors, centers)]).square().sum(1).mean()
    return centers, distance


def _nearest(vectors: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest center of every vector, (N,); in parts, since (N, K) can be large."""
    norms = centers.square().sum(1)
    starts = range(0, len(vectors), 8192)
    return torch.cat([(norms - 2 * vectors[start : start + 8192] @ centers.t()).argmin(1) for start in starts])


@torch.no_grad()
def set_codes(dvae: DVAE, bridge: nn.Conv2d, centers: Tensor, scale: float) -> None:
    """Makes every center a code: logits fall with the squared distance of the bridged feature to the center.

    ``-scale * ||A f + b - c_k||^2`` is linear in the feature f but for a term that all codes share, so it fits the
    encoder's last layer; the decoder's first layer looks the center up.

    Args:
        dvae: Network whose ``encoder.output`` and ``decoder.input`` are overwritten.
        bridge: The linear map from features to the decoder's stem, (A, b).
        centers: (K, stem).
        scale: Logit per unit of squared distance.
    """
    assert bridge.bias is not None
    matrix, offset = bridge.weight[:, :, 0, 0], bridge.bias
    output, table = dvae.encoder.output, dvae.decoder.input
    output.weight.copy_((2 * scale * centers @ matrix)[:, :, None, None])
    assert output.bias is not None
    output.bias.copy_(scale * (2 * centers @ offset - centers.square().sum(1)))
    table.weight.copy_(centers.t()[:, :, None, None])
