"""Everything that is measured of a split, and what the model was to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_zoo.images import to_uint8
from dalle_zoo.models.ranker import Ranker
from dalle_zoo.pipeline import DallePipeline
from dalle_zoo_eval.concepts.protocol import BITS_SAVED, ConceptProtocol, TargetRule
from dalle_zoo_eval.concepts.splits import Sampled, Split
from dalle_zoo_eval.evaluator import MobileNet
from dalle_zoo_eval.measures import frechet_distance
from dalle_zoo_eval.metrics import (
    bits_per_token,
    codebook_use,
    concept_accuracy,
    in_batches,
    psnr,
    retrieval,
    shuffle_concepts,
)
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.statistics import Moments

# B samples, N candidates of a caption, h w code grid, d features


@dataclass(frozen=True)
class Gallery:
    """Real images of all splits as the evaluator sees them."""

    evaluator: MobileNet
    ks: tuple[int, ...]
    keys: list[str]
    concepts: list[str]
    features: Tensor

    @classmethod
    def of(cls, evaluator: MobileNet, splits: Sequence[Split], ks: tuple[int, ...]) -> Gallery:
        """Features of all images of the splits.

        Args:
            evaluator: The network.
            splits: All samples of each.
            ks: Neighbors among which a concept is looked for.
        """
        return cls(
            evaluator,
            ks,
            [key for split in splits for key in split.keys],
            [concept for split in splits for concept in split.concepts],
            torch.cat([evaluator.features(split.images) for split in splits]),
        )

    def accuracy(self, features: Tensor, keys: list[str], concepts: list[str]) -> dict[str, float]:
        """Concept accuracy for every k, as ``top1`` and so on."""
        known = (self.features, self.keys, self.concepts)
        return {f"top{k}": concept_accuracy(features, keys, concepts, *known, k=k) for k in self.ks}


@dataclass(frozen=True)
class Generated:
    """Images generated from prompts of a split."""

    best: Tensor | None
    """Which candidate the ranker scores highest, int64 (B,); None without a ranker."""
    shown: Tensor
    """That candidate, or the first one without a ranker: uint8 (B, 3, H, W)."""
    features: Tensor | None
    """Of all candidates, (B, N, d); None without an evaluator."""
    ranker_features: Tensor | None
    """Likewise as the ranker sees them; None without a ranker."""


def measure_split(
    pipe: DallePipeline, split: Sampled, sampled_codes: Tensor, gallery: Gallery | None, seed: int
) -> tuple[dict[str, Any], Generated]:
    """All figures of one split, and the images that were generated.

    Args:
        pipe: The model.
        split: The samples.
        sampled_codes: Codes of all candidates of the captions, int64 (B, N, h, w).
        gallery: Where concepts are looked for; None leaves their accuracy out.
        seed: Seed of the shuffled captions.
    """
    samples, asked = split.samples, split.asked
    codes, rebuilt = reconstruct(pipe, samples.images)
    generated = judge(pipe, asked, sampled_codes, gallery)
    figures: dict[str, Any] = {
        "samples": len(samples.keys),
        "captions": len(asked.keys),
        "keys_sha256": digest(samples.keys),
        "captions_sha256": digest(samples.captions),
        "psnr": float(psnr(rebuilt.float() / 255, samples.images.float() / 255).mean()),
        "codebook": codebook_use(codes, pipe.image_tokenizer.codebook_size),
        "bits": caption_bits(pipe, samples, codes, seed),
    }
    if pipe.ranker is not None:
        figures["retrieval"] = retrieval(pipe.ranker, samples.images.float() / 255, samples.captions)
        figures["ranker_distance"] = ranker_distances(pipe.ranker, samples, rebuilt, generated)
    if gallery is not None:
        figures["concept_accuracy"] = concept_figures(gallery, asked, rebuilt[: len(asked.keys)], generated, seed)
    return figures, generated


@torch.inference_mode()
def reconstruct(pipe: DallePipeline, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, h, w) and rebuilt images, uint8 like the given ones."""
    parts = [(part.float() / 255).to(pipe.device) for part in in_batches(images, 64)]
    codes = torch.cat([pipe.image_tokenizer.encode(part).cpu() for part in parts])
    return codes, to_uint8(pipe.decode(codes))


def caption_bits(pipe: DallePipeline, split: Split, codes: Tensor, seed: int) -> dict[str, float]:
    """Bits per image token with the right captions, those of other concepts, and none."""
    right = pipe.encode_text(split.captions)
    texts = {
        "right": right,
        "shuffled": right[shuffle_concepts(split.concepts, seed)],
        "none": pipe.prior.null_text().expand_as(right),
    }
    return {name: bits_per_token(pipe.prior, text, codes) for name, text in texts.items()}


@torch.inference_mode()
def judge(pipe: DallePipeline, split: Split, codes: Tensor, gallery: Gallery | None) -> Generated:
    """Decodes the candidates, caption by caption, and lets ranker and evaluator look at them."""
    best, shown, features, ranker_features = [], [], [], []
    for caption, candidates in zip(split.captions, codes, strict=True):
        images = to_uint8(pipe.decode(candidates))
        first = 0
        if pipe.ranker is not None:
            first = int(pipe.ranker.rank(images.float() / 255, caption)[0])
            ranker_features.append(ranker_sees(pipe.ranker, images))
        best.append(first)
        shown.append(images[first])
        if gallery is not None:
            features.append(gallery.evaluator.features(images))
    return Generated(
        best=torch.tensor(best) if pipe.ranker is not None else None,
        shown=torch.stack(shown),
        features=torch.stack(features) if gallery is not None else None,
        ranker_features=torch.stack(ranker_features) if pipe.ranker is not None else None,
    )


@torch.inference_mode()
def ranker_sees(ranker: Ranker, images: Tensor) -> Tensor:
    """Features of uint8 images (B, 3, H, W), (B, d) on the CPU."""
    parts = [ranker.image_features(part.to(ranker.device).float() / 255).cpu() for part in in_batches(images, 64)]
    return torch.cat(parts)


def ranker_distances(ranker: Ranker, split: Split, rebuilt: Tensor, generated: Generated) -> dict[str, float]:
    """Frechet distances to the real images of a split in the ranker's features: no FID, which needs Inception.

    ``one`` is the mean over the candidates, ``best`` the candidate that the same ranker prefers, so of the two the
    distance of ``best`` flatters more. Empty where there are too few images for the covariance.
    """
    assert generated.ranker_features is not None and generated.best is not None  # noqa: PT018 (one thing: there is a ranker)

    real = Moments.of(ranker_sees(ranker, split.images))
    everything = [Moments.of(features) for features in generated.ranker_features.unbind(1)]
    if real.rank_deficient or everything[0].rank_deficient:
        return {}
    best = generated.ranker_features[torch.arange(len(generated.best)), generated.best]
    return {
        "reconstructed": frechet_distance(Moments.of(ranker_sees(ranker, rebuilt)), real),
        "best": frechet_distance(Moments.of(best), real),
        "one": sum(frechet_distance(candidate, real) for candidate in everything) / len(everything),
    }


def concept_figures(
    gallery: Gallery, split: Split, rebuilt: Tensor, generated: Generated, seed: int
) -> dict[str, dict[str, float]]:
    """Concept accuracy of everything that has a concept, for every k.

    ``real`` is the ceiling, ``reconstructed`` what the image tokenizer leaves of it. ``one`` is one
    image a caption: the mean over all candidates, which is its expectation. ``best`` is the
    candidate that the ranker prefers. ``shuffled`` is the floor: all candidates, held against the
    concept of another caption.
    """
    assert generated.features is not None
    keys, concepts = split.keys, split.concepts
    candidates = generated.features.shape[1]
    other = shuffle_concepts(concepts, seed).tolist()

    def each(values: list[str]) -> list[str]:
        return [value for value in values for _ in range(candidates)]

    everything = generated.features.flatten(0, 1)
    real = gallery.evaluator.features(split.images)
    figures = {
        "real": gallery.accuracy(real, keys, concepts),
        "reconstructed": gallery.accuracy(gallery.evaluator.features(rebuilt), keys, concepts),
        "one": gallery.accuracy(everything, each(keys), each(concepts)),
        "shuffled": gallery.accuracy(everything, each([keys[i] for i in other]), each([concepts[i] for i in other])),
    }
    if generated.best is not None:
        picked = generated.features[torch.arange(len(keys)), generated.best]
        figures["best"] = gallery.accuracy(picked, keys, concepts)
    return figures


def targets(protocol: ConceptProtocol, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model was to reach, what it reached, and whether that is enough; without what was not measured."""
    rows = []
    for rule in protocol.targets:
        name, reached = _reached(rule, figures[rule.split], protocol.ks[-1])
        if reached is not None:
            met = reached >= rule.required
            rows.append({"name": name, "required": rule.required, "reached": reached, "met": met})
    return rows


def _reached(rule: TargetRule, figures: dict[str, Any], k: int) -> tuple[str, float | None]:
    """Name and value of a measure on its split; no value where it was not measured."""
    if rule.measure == BITS_SAVED:
        bits = figures["bits"]
        saved = bits["shuffled"] - bits["right"]
        return f"bits per token that the right caption saves over a shuffled one, {rule.split}", saved
    accuracy = figures.get("concept_accuracy", {})
    ceiling, best = (accuracy.get(kind, {}).get(f"top{k}") for kind in ("real", "best"))
    share = best / ceiling if best is not None and ceiling else None
    return f"concept accuracy, top {k}, best candidate, share of the ceiling, {rule.split}", share


def left_out(pipe: DallePipeline, gallery: Gallery | None) -> list[str]:
    """What was not measured, and why."""
    lines = []
    if gallery is None:
        lines.append("concept accuracy: no evaluator was given")
    if pipe.ranker is None:
        lines.append("retrieval and best candidate: the model has no ranker")
    return lines
