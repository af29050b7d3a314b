"""Samples of a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dalle_zoo.data import ImageTextDataset, open_source
from dalle_zoo.sampling import derive_seed
from dalle_zoo_eval.concepts.protocol import ConceptProtocol
from dalle_zoo_eval.metrics import shuffle_concepts

# B samples, H W pixels


@dataclass(frozen=True)
class Split:
    """Samples of a split."""

    name: str
    keys: list[str]
    """``<concept>_<style>``."""
    captions: list[str]
    images: Tensor
    """uint8 (B, 3, H, W)."""

    @property
    def concepts(self) -> list[str]:
        """The concept of every sample: equal for the styles of one thing."""
        return [key.rpartition("_")[0] for key in self.keys]

    def take(self, indices: Sequence[int]) -> Split:
        """Some of the samples, in the order of the indices."""
        return Split(
            self.name,
            [self.keys[i] for i in indices],
            [self.captions[i] for i in indices],
            self.images[list(indices)],
        )

    def first(self, count: int | None) -> Split:
        """At most ``count`` samples from the front; None takes all."""
        return self.take(range(len(self.keys))[:count])

    def sample(self, count: int | None, seed: int) -> Split:
        """At most ``count`` samples, or all, in an order that the seed and the split's name fix."""
        order = torch.Generator().manual_seed(derive_seed(seed, "samples", self.name))
        return self.take(torch.randperm(len(self.keys), generator=order)[:count].tolist())


@dataclass(frozen=True)
class Sampled:
    """What is measured of a split."""

    complete: Split
    """All that the source holds, where concepts are looked for."""
    samples: Split
    """Those that are sampled by seed: for reconstruction, bits and retrieval."""
    asked: Split
    """The first of the samples: images are generated from prompts."""


def load_split(name: str, source: str, image_size: int) -> Split:
    """All samples of a source, with the first caption of each.

    Raises:
        ValueError: The source cannot be opened, or a key names no concept.
    """
    items = list(ImageTextDataset(open_source(source), transform="center", size=image_size))
    keys = [item["key"] for item in items]
    nameless = [key for key in keys if not key.rpartition("_")[0]]
    if nameless:
        raise ValueError(
            f"split {name}, {source}: {len(nameless)} keys name no concept, such as {nameless[0]!r}: expected "
            "<concept>_<style>"
        )
    return Split(name, keys, [item["caption"] for item in items], torch.stack([item["image"] for item in items]))


def load_samples(protocol: ConceptProtocol, image_size: int) -> list[Sampled]:
    """All splits of a protocol.

    Raises:
        ValueError: A split cannot be read, or its figures could not be measured.
    """
    found = []
    for name, rule in protocol.splits.items():
        complete = load_split(name, rule.source, image_size)
        samples = complete.sample(protocol.samples, protocol.seed)
        found.append(Sampled(complete, samples, samples.first(rule.captions)))
    _check(found, protocol)
    return found


def _check(splits: Sequence[Sampled], protocol: ConceptProtocol) -> None:
    """What would otherwise fail after the images are generated."""
    for split in splits:
        for part in (split.samples, split.asked):
            try:
                shuffle_concepts(part.concepts, protocol.seed)
            except ValueError as error:
                raise ValueError(f"split {split.complete.name}: {error}") from None
    gallery = Counter(key for split in splits for key in split.complete.keys)
    repeated = [key for key, count in gallery.items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} keys stand in more than one split, such as {repeated[0]!r}: rename them")
    if protocol.ks[-1] >= len(gallery):
        raise ValueError(f"ks must be below the number of images, {len(gallery)}, got {protocol.ks[-1]}")
