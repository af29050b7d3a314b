"""Starts the codes of stage 1 where images put them: an autoencoder first, then k-means of its features.

Not in the paper, which has three million steps to spread its codes. In the few thousand that two CPU cores can do,
the relaxation from random weights uses only a few codes and never the others.
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
    quantized_steps: int = 0
    """Steps after k-means in which the encoder, the codes and the decoder learn together by vector quantization: each
    feature is replaced by its nearest code, and the gradient passes straight through (van den Oord et al., 2017)."""
    commitment: float = 0.25
    """Weight of the squared distance of features to their codes, as a share of their variance, in those steps."""
    codebook_decay: float = 0.99
    """Decay of the running mean of a code per step."""
    revive_every: int = 100
    """Codes that no feature chose in this number of those steps move to features of the latest batch."""

    @property
    def total_steps(self) -> int:
        """Steps before the relaxation begins."""
        return self.steps + self.quantized_steps

    def __post_init__(self) -> None:
        if not 1 <= self.gather <= self.steps:
            raise ValueError(f"gather must be between 1 and steps {self.steps}, got {self.gather}")
        if self.quantized_steps < 0 or self.revive_every < 1 or self.commitment < 0:
            raise ValueError(
                "quantized_steps and commitment must be at least 0 and revive_every at least 1, got "
                f"{self.quantized_steps}, {self.commitment} and {self.revive_every}"
            )
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
        chosen = nearest(vectors, centers)
        sums = torch.zeros_like(centers).index_add_(0, chosen, vectors)
        sizes = torch.bincount(chosen, minlength=count)
        strays = torch.randint(len(vectors), (count,), generator=generator).to(vectors.device)
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], vectors[strays])
    distance = (vectors - centers[nearest(vectors, centers)]).square().sum(1).mean()
    return centers, distance


def nearest(vectors: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest center of every vector, (N,); in parts, since (N, K) can be large."""
    norms = centers.square().sum(1)
    starts = range(0, len(vectors), 8192)
    return torch.cat([(norms - 2 * vectors[start : start + 8192] @ centers.t()).argmin(1) for start in starts])


class Codebook(nn.Module):
    """Vectors of the codes while they are learned: running means of the features that chose them.

    Reference: Neural Discrete Representation Learning (van den Oord et al., 2017), appendix A.1.

    Args:
        count: Number of codes K.
        size: Dimension of a vector D.
        warm: Settings.
    """

    def __init__(self, count: int, size: int, warm: WarmStart) -> None:
        super().__init__()
        self.warm = warm
        # No buffers: DDP overwrites those of all processes with those of the first.
        self.sums = torch.zeros(count, size)
        """Running sum of the features of each code, (K, D)."""
        self.counts = torch.ones(count)
        """Running number of them."""
        self.use = torch.zeros(count)
        """How often each code was chosen since the unused ones were last moved."""
        self.distance = torch.ones(())
        """Running mean of the squared distance of a feature to its code."""

    @property
    def vectors(self) -> Tensor:
        """The codes, (K, D)."""
        return self.sums / self.counts[:, None]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes features.

        Args:
            features: (B, D, h, w).

        Returns:
            The nearest codes' vectors, (B, D, h, w), whose gradient goes to the features; the loss that pulls features
            to their codes, the squared distance as a share of the features' variance; and what `observe` takes for
            every code, (K, D + 2): the sum and the number of its features, and of their squared distances.
        """
        flat = features.permute(0, 2, 3, 1).flatten(0, 2)
        vectors = self.vectors.to(flat.device)
        with torch.no_grad():
            chosen = nearest(flat, vectors)
        codes = vectors[chosen]
        distances = (codes - flat).square().sum(1)
        with torch.no_grad():
            rows = torch.cat([flat, torch.ones_like(distances)[:, None], distances[:, None]], 1)
            facts = flat.new_zeros(len(vectors), rows.shape[1]).index_add_(0, chosen, rows)
        passed = flat + (codes - flat).detach()
        shape = (features.shape[0], *features.shape[2:], -1)
        loss = self.warm.commitment * distances.mean() / flat.detach().var(0).sum().clamp(min=1e-12)
        return passed.view(shape).permute(0, 3, 1, 2), loss, facts

    def observe(self, facts: Tensor) -> None:
        """Takes what `forward` returns for a batch, averaged over all processes."""
        new, device = 1 - self.warm.codebook_decay, facts.device
        sums, counts, squares = facts[:, :-2], facts[:, -2], facts[:, -1]
        self.sums = self.sums.to(device).lerp(sums, new)
        self.counts = self.counts.to(device).lerp(counts, new).clamp(min=1e-6)
        self.distance = self.distance.to(device).lerp(squares.sum() / counts.sum(), new)
        self.use = self.use.to(device) + counts

    def start(self, centers: Tensor, distance: Tensor) -> None:
        """Takes the centers of k-means (K, D) and their mean squared distance."""
        self.sums, self.counts = centers.clone(), torch.ones_like(centers[:, 0])
        self.distance = distance.clone()
        self.use = torch.zeros_like(self.counts)

    def revive(self, features: Tensor, generator: torch.Generator) -> None:
        """Moves codes that nothing chose to features, (N, D)."""
        unused = self.use == 0
        rows = torch.randint(len(features), (int(unused.sum()),), generator=generator)
        self.sums[unused] = features[rows.to(features.device)]
        self.counts[unused] = 1.0
        self.use = torch.zeros_like(self.use)

    def state(self) -> dict[str, Tensor]:
        """Returns the state for resuming a run."""
        return {name: getattr(self, name) for name in ("sums", "counts", "use", "distance")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes a `state` up again."""
        for name, value in state.items():
            setattr(self, name, value)


@torch.no_grad()
def set_codes(dvae: DVAE, bridge: nn.Conv2d, centers: Tensor, scale: float) -> None:
    """Makes every center a code: logits fall with the squared distance of the bridged feature to the center.

    ``-scale * ||A f + b - c_k||^2`` is linear in the feature f except for a term that all codes share, so it fits the
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
