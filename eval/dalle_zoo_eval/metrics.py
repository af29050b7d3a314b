"""Metrics as pure functions of tensors, and of networks passed in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.models.image_prior import ImagePrior
from dalle_zoo.models.ranker import Ranker, retrieval_accuracy

# B images, C channels, H W pixels, h w code grid, K codebook size, T text positions, d features,
# Q queries, G gallery


def in_batches(tensor: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Parts of a tensor along its first axis, the last one shorter."""
    for start in range(0, len(tensor), batch_size):
        yield tensor[start : start + batch_size]


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image, in dB.

    ``-10 log10(mean squared error)`` over the values of one image; infinite for equal images.

    Args:
        images: Pixels in [0, 1], (B, C, H, W).
        references: Likewise, same shape.

    Returns:
        (B,).
    """
    if images.shape != references.shape:
        raise ValueError(
            f"images and references must have one shape, got {tuple(images.shape)} and {tuple(references.shape)}"
        )
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def codebook_use(codes: Tensor, codebook_size: int) -> dict[str, float]:
    """How much of the codebook a set of images uses.

    Args:
        codes: Codes of all images, integers of any shape.
        codebook_size: K.

    Returns:
        ``used``, the share of codes that occur at all, and ``perplexity``, exp of the entropy of
        their frequencies: between 1 and K.
    """
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    share = counts / counts.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return {"used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


@torch.inference_mode()
def bits_per_token(prior: ImagePrior, text: Tensor, codes: Tensor, batch_size: int = 32) -> float:
    """Mean loss of the prior over image tokens, in bits.

    Args:
        prior: The network, in evaluation mode.
        text: Caption ids, int64 (B, T): the right ones, others, or ``prior.null_text()`` repeated.
        codes: Image tokens, int64 (B, h, w).
        batch_size: Images at once; does not change the result beyond rounding.
    """
    if len(text) != len(codes) or not len(codes):
        raise ValueError(f"text and codes must be equally many and not none, got {len(text)} and {len(codes)}")
    device, total = prior.device, 0.0
    for t, c in zip(in_batches(text, batch_size), in_batches(codes, batch_size), strict=True):
        logits = prior.image_logits(t.to(device), c.to(device)).float()
        total += float(F.cross_entropy(logits.transpose(1, 2), c.to(device).flatten(1), reduction="sum"))
    return total / codes.numel() / math.log(2)


def shuffle_concepts(concepts: Sequence[str], seed: int) -> Tensor:
    """A fixed permutation that gives every sample one of another concept.

    Samples are put in groups by concept, the groups in random order, and each sample takes the one
    that is further by the size of the largest group: never one of its own.

    Args:
        concepts: Concept of each of B samples.
        seed: Seed of the random order.

    Returns:
        int64 (B,), no concept mapped to itself.

    Raises:
        ValueError: One concept has more than half of the samples, so there is no such permutation.
    """
    sample = torch.Generator().manual_seed(seed)
    random = torch.randperm(len(concepts), generator=sample).tolist()
    groups: dict[str, list[int]] = {}
    for index in random:
        groups.setdefault(concepts[index], []).append(index)
    largest = max(map(len, groups.values()), default=0)
    if 2 * largest > len(concepts):
        raise ValueError(
            f"captions can't be shuffled across concepts: one has {largest} of {len(concepts)} "
            "samples, at most half is possible"
        )
    order = torch.tensor([index for group in groups.values() for index in group])
    permutation = torch.empty_like(order)
    permutation[order] = order.roll(-largest)
    return permutation


@torch.inference_mode()
def retrieval(ranker: Ranker, images: Tensor, captions: Sequence[str], batch_size: int = 64) -> dict[str, float]:
    """How often the ranker finds the partner among all, from image to caption and back.

    Args:
        ranker: The network, in evaluation mode.
        images: Pixels in [0, 1], (B, 3, H, W).
        captions: B captions; row i belongs to image i.
        batch_size: Images or captions at once.

    Returns:
        As `retrieval_accuracy`: shares for k = 1 and 5, both ways.
    """
    image = torch.cat([ranker.image_features(part) for part in in_batches(images, batch_size)])
    starts = range(0, len(captions), batch_size)
    text = torch.cat([ranker.text_features(captions[i : i + batch_size]) for i in starts])
    return retrieval_accuracy(image, text)


def concept_accuracy(
    query_features: Tensor,
    query_keys: Sequence[str],
    query_concepts: Sequence[str],
    gallery_features: Tensor,
    gallery_keys: Sequence[str],
    gallery_concepts: Sequence[str],
    k: int,
) -> float:
    """Share of queries that have their concept among the k nearest images of the gallery.

    Nearest by cosine. The gallery image with the query's own key is left out.

    Args:
        query_features: (Q, d), of any length.
        query_keys: Key of the image that each query stands for.
        query_concepts: Concept of each query.
        gallery_features: (G, d).
        gallery_keys: Keys of the gallery, all different.
        gallery_concepts: Concepts of the gallery.
        k: Neighbors, fewer than G.
    """
    if not 1 <= k < len(gallery_keys):
        raise ValueError(f"k must lie in 1..{len(gallery_keys) - 1} (the gallery), got {k}")
    if not len(query_features) == len(query_keys) == len(query_concepts):
        raise ValueError(
            f"features, keys and concepts must be one a query, got {len(query_features)}, "
            f"{len(query_keys)} and {len(query_concepts)}"
        )
    place = {key: index for index, key in enumerate(gallery_keys)}
    names = {name: index for index, name in enumerate(dict.fromkeys(gallery_concepts))}
    own = torch.tensor([place.get(key, -1) for key in query_keys])
    wanted = torch.tensor([names.get(concept, -1) for concept in query_concepts])
    concepts = torch.tensor([names[concept] for concept in gallery_concepts])
    gallery = torch.nn.functional.normalize(gallery_features, dim=-1).t()
    similarity = torch.nn.functional.normalize(query_features, dim=-1) @ gallery
    rows = (own >= 0).nonzero().flatten()
    similarity[rows, own[rows]] = -torch.inf
    nearest = concepts[similarity.topk(k, dim=1).indices]
    return float((nearest == wanted[:, None]).any(1).float().mean())
