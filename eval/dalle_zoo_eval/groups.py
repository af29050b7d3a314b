"""Evaluates a group of prompts: real images, generated images, and the feature stores of all image sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dalle_zoo.pipeline import DallePipeline
from dalle_zoo.sampling import derive_seed
from dalle_zoo_eval.datasets import CaptionList, DatasetError, EvalDataset, Item, choose_captions, read_dataset
from dalle_zoo_eval.datasets.digests import MEMO
from dalle_zoo_eval.datasets.images import box_radius
from dalle_zoo_eval.datasets.prompts import check_exclusions, shuffle_concepts
from dalle_zoo_eval.extractors import EXTRACTORS, Extractor
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.generation import GeneratedImages, model_sha256
from dalle_zoo_eval.image_sources import GeneratedSet, ImageFiles, ImageSource, Reconstructions
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.opening import extractors_of
from dalle_zoo_eval.protocol import Protocol
from dalle_zoo_eval.provenance import digest
from dalle_zoo_eval.rules import MetricRule
from dalle_zoo_eval.statistics import StoredReference

STORED_AS = {"candidates": "generated", "shuffled": "generated"}
"""Image sets whose features are in the store of another image set."""
GALLERY = "gallery"
"""Store of all images of the group's dataset, for metrics whose reference is that of all groups."""
PRIOR = "prior"
"""Extractor that also takes captions of other images."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The real images of a group, and the captions from which images are generated."""

    dataset: EvalDataset
    """All images of the split."""
    sha256: str
    """Digest of the dataset."""
    samples: list[Item]
    """Real images to evaluate."""
    captions: CaptionList | None
    """Chosen captions; None if no images are generated."""
    expected: int
    """Number of captions that the protocol requires, regardless of changes by the caller; 0 if unknown."""
    excluded: frozenset[str]
    """Keys of excluded images."""


def read_prompts(
    protocol: Protocol, name: str, *, layout: str | None, data: Path | None, excluded: frozenset[str], cache: Path
) -> Prompts:
    """Reads the dataset of a group and chooses its samples.

    Args:
        protocol: Protocol of the evaluation.
        name: Name of the group.
        layout: Layout of the dataset. None selects the first layout of the group.
        data: Folder of the dataset; None for datasets that need none.
        excluded: Keys of excluded images.
        cache: Folder in which digests of images are cached.

    Raises:
        UnknownNameError: The protocol does not list the layout.
        DatasetError: The dataset is not the one of the protocol, has too few images, or lacks usable bounding boxes.
        UnavailableGroupError: The user's own files do not allow the group.
    """
    rule = protocol.groups[name]
    layout = layout or rule.layout
    dataset = read_dataset(layout, data, protocol.split(name, layout))
    check_exclusions(dataset, excluded)
    _check_dataset(protocol, name, layout, dataset)
    samples = [item for item in dataset.items if item.image is not None and item.key not in excluded]
    if rule.samples is not None or rule.captions.rule == "first":
        order = torch.Generator().manual_seed(derive_seed(protocol.seed, "samples", name))
        samples = [samples[i] for i in torch.randperm(len(samples), generator=order).tolist()]
        samples = alternating(samples, rule.samples) if dataset.any_number else samples[: rule.samples]
    if len(samples) < 2:
        raise DatasetError(f"dataset {dataset.name} in {dataset.root} has {len(samples)} images, expected at least 2")
    boxless = [item.key for item in samples if item.box is None]
    if protocol.image.crop == "box" and boxless:
        raise DatasetError(
            f"{protocol.name} crops images to their bounding boxes, but {len(boxless)} images of {dataset.name}, "
            f"such as {boxless[0]!r}, have none: is there a bounding_boxes.txt?"
        )
    tiny = [i.key for i in samples if i.box is not None and box_radius(i.box) < 1]
    if protocol.image.crop == "box" and tiny:
        raise DatasetError(
            f"{len(tiny)} bounding boxes of {dataset.name}, such as that of {tiny[0]!r}, are too small to be cropped: "
            "correct them"
        )
    return Prompts(
        dataset=dataset,
        sha256=dataset.sha256(cache / MEMO),
        samples=samples,
        captions=None,
        expected=0,
        excluded=excluded,
    )


def alternating(items: Sequence[Item], count: int | None = None) -> list[Item]:
    """Returns items in an order that alternates between concepts, none of which has more than half of them.

    Args:
        items: Items of two or more concepts.
        count: Maximum number of items. Defaults to all.

    Example:
        >>> cats = [Item(key=f"cat {n}", image=None, captions=("a cat",), concept="cat") for n in range(3)]
        >>> dog = Item(key="dog", image=None, captions=("a dog",), concept="dog")
        >>> [item.key for item in alternating([*cats, dog])]
        ['cat 0', 'dog']
    """
    turns = Counter[str]()
    ordered: list[tuple[int, int]] = []
    for place, item in enumerate(items):
        ordered.append((turns[item.concept], place))
        turns[item.concept] += 1
    chosen = [items[place] for _, place in sorted(ordered)][:count]
    largest = max(Counter(item.concept for item in chosen).values(), default=0)
    return chosen[: 2 * (len(chosen) - largest)]  # the surplus of the largest concept comes last


def choose(protocol: Protocol, name: str, prompts: Prompts, *, count: int | None) -> CaptionList:
    """Chooses the captions of a group.

    Args:
        protocol: Protocol of the evaluation.
        name: Name of the group.
        prompts: Dataset and samples of the group.
        count: Number of captions; None takes all. Datasets of any number of prompts may have fewer.

    Raises:
        DatasetError: There are fewer captions than ``count``.
    """
    rule = protocol.groups[name].captions
    seed = protocol.seed if rule.seed is None else rule.seed
    items = prompts.samples if rule.rule == "first" else prompts.dataset.items
    if prompts.dataset.any_number and count is not None:
        items = alternating(items, count)
        count = len(items)
    return choose_captions(
        prompts.dataset, items=items, count=count, rule=rule.rule, seed=seed, exclude=prompts.excluded
    )


def _check_dataset(protocol: Protocol, name: str, layout: str, dataset: EvalDataset) -> None:
    expected = protocol.groups[name].num_images.get(layout, len(dataset.items))
    if len(dataset.items) != expected:
        first = f", such as {dataset.skipped[0]}" if dataset.skipped else ""
        raise DatasetError(
            f"{protocol.name} is defined for the {expected} captioned images of {dataset.name}, but {dataset.root} "
            f"has {len(dataset.items)} ({len(dataset.skipped)} were left out{first}): complete the dataset, or write "
            "a protocol of another name"
        )


def generate(
    pipe: DallePipeline,
    protocol: Protocol,
    name: str,
    prompts: Prompts,
    *,
    size: int | None,
    batch_size: int,
    cache: Path,
) -> GeneratedSet:
    """Returns the images that a model generates for a group; they are generated when they are first needed.

    Args:
        pipe: The model.
        protocol: Protocol of the evaluation.
        name: Name of the group.
        prompts: Dataset and captions of the group.
        size: Side to which images are scaled, pixels; None leaves them unscaled.
        batch_size: Number of images generated at once.
        cache: Folder of the codes.
    """
    assert prompts.captions is not None
    by_key = {item.key: item for item in prompts.dataset.items}
    keys, texts = [key for key, _ in prompts.captions.entries], [caption for _, caption in prompts.captions.entries]
    group = protocol.groups[name]
    every = any({"candidates", "shuffled"} & set(rule.images) for rule in group.metrics)
    primes, rows = None, max(1, round(group.prime * pipe.prior.config.image_height))
    if group.prime:
        given = [by_key[key] for key in keys]
        primes = ImageFiles(given, protocol.image.crop, pipe.image_size[0], source=prompts.sha256)
    weights = model_sha256(pipe)
    assert pipe.folder is not None
    return GeneratedSet(
        source=GeneratedImages(
            pipe, texts, protocol.sampling, seed=protocol.seed, group=name, size=size, batch_size=batch_size,
            every=every, cache=cache, primes=primes, prime_rows=rows,
        ),
        record={
            "kind": "model",
            "name": pipe.folder.name,
            "weights_sha256": {n: d for n, d in weights.items() if n.endswith(".safetensors")},
            "files_sha256": {n: d for n, d in weights.items() if not n.endswith(".safetensors")},
            "generated_at": list(pipe.image_size),
        },
        keys=keys,
        concepts=[by_key[key].concept or key for key in keys],
        texts=texts,
        targets=[by_key[key].targets for key in keys],
    )  # fmt: skip


def image_size(protocol: Protocol, pipe: DallePipeline | None) -> int | None:
    """Returns the side to which images are scaled, pixels: that of the protocol, or else of the model's images."""
    return protocol.image.size or (pipe.image_size[0] if pipe is not None else None)


class Group:
    """Image sets of a group, and the annotations of their samples that metrics use.

    Args:
        name: Name of the group.
        protocol: Protocol of the evaluation.
        prompts: Real images and captions.
        generated: Generated images.
        extractors: All opened extractors.
        pipe: The model; None for images of another system.
        cache: Folder of the features.
        device: Device of the extractors.
        reference: Statistics in the place of the real images. Defaults to none.
        more: Extractors to apply to the generated images in addition to those of the metrics. Defaults to none.

    Raises:
        ValueError: Captions cannot be shuffled across concepts, or there are fewer than 2 samples.
    """

    def __init__(
        self,
        name: str,
        protocol: Protocol,
        prompts: Prompts,
        generated: GeneratedSet,
        extractors: Mapping[str, Extractor],
        *,
        pipe: DallePipeline | None,
        cache: Path,
        device: str,
        reference: StoredReference | None = None,
        more: Sequence[str] = (),
    ) -> None:
        self.name, self.protocol, self.prompts, self.generated = name, protocol, prompts, generated
        self.extractors, self.left_out = extractors, list[str]()
        # Each metric with the image sets on which it can be computed.
        self.plan = [(rule, self._possible(rule, pipe)) for rule in protocol.groups[name].metrics]
        size = image_size(protocol, pipe)
        chunk, crop = protocol.image.chunk or protocol.sampling.chunk, protocol.image.crop
        needed = self._needed(more)
        others = self._other_captions() if PRIOR in needed["real"] else []
        real = ImageFiles(prompts.samples, crop, size, source=prompts.sha256, others=others)
        sources: dict[str, tuple[ImageSource, int]] = {
            "real": (real, chunk), "generated": (generated.source, protocol.sampling.chunk)
        }  # fmt: skip
        if pipe is not None and any("reconstructed" in images for _, images in self.plan):
            sources["reconstructed"] = (Reconstructions(real, pipe, model_sha256(pipe)), chunk)
        if needed[GALLERY]:
            items = [item for item in prompts.dataset.items if item.image is not None]
            sources[GALLERY] = (ImageFiles(items, crop, size, source=prompts.sha256), chunk)
        self.stores: dict[str, FeatureStore] = {
            images: FeatureStore(
                source, {n: extractors[n] for n in needed[images]},
                protocol.blur if images in ("real", "generated") else (0,), chunk, cache, device,
            )
            for images, (source, chunk) in sources.items()
        }  # fmt: skip
        self.reference: FeatureStore | StoredReference = reference or self.stores["real"]
        self.shuffled: list[int] = []
        if any("shuffled" in images for _, images in self.plan):
            self.shuffled = self._shuffle(generated.concepts)

    def _possible(self, rule: MetricRule, pipe: DallePipeline | None) -> list[str]:
        """Returns the available image sets of a metric; adds the reasons for the others to ``left_out``."""
        images = list(rule.images)
        unranked = pipe is not None and pipe.ranker is None and self.protocol.sampling.candidates > 1
        for name, reason, impossible in (
            ("reconstructed", "the images were not generated by a model", pipe is None),
            ("candidates", "the images were not generated by a model", pipe is None),
            ("generated", "the model has no ranker to choose among candidates", unranked),
        ):
            if impossible and name in images:
                images.remove(name)
                self.left_out.append(f"{rule.name} of {name} images: {reason}")
        return images

    def _needed(self, more: Sequence[str]) -> dict[str, list[str]]:
        """Returns the extractors of every image set."""
        sets = ("real", "reconstructed", "generated", GALLERY)
        needed: dict[str, dict[str, None]] = {images: {} for images in sets}
        needed["generated"].update(dict.fromkeys(more))
        for rule, sets_of in self.plan:
            names, spec = dict.fromkeys(extractors_of(rule, self.extractors)), METRICS.spec(rule.name)
            for images in sets_of:
                needed[STORED_AS.get(images, images)].update(names)
            if "real" in spec.inputs:
                needed["real" if spec.reference == "group" else GALLERY].update(names)
        if self.protocol.selfcheck:
            needed["real"].update(dict.fromkeys(n for n in self.extractors if not EXTRACTORS.spec(n).model_part))
        return {images: list(names) for images, names in needed.items()}

    def _shuffle(self, concepts: Sequence[str]) -> list[int]:
        try:
            return shuffle_concepts(concepts, self.protocol.seed)
        except ValueError as error:
            raise ValueError(f"group {self.name}: {error}") from None

    def _other_captions(self) -> list[str]:
        """Returns for every sample the caption of a sample of another concept."""
        samples = self.prompts.samples
        order = self._shuffle([item.concept or item.key for item in samples])
        return [samples[i].captions[0] for i in order]

    def known(self, images: str) -> dict[str, list[Any] | None]:
        """Returns the annotations of an image set by the names of metric inputs; None where they are missing.

        Args:
            images: Name of the image set.
        """
        if STORED_AS.get(images, images) == "generated":
            found = self.generated
            order = self.shuffled if images == "shuffled" else range(len(found.keys))
            return {
                "keys": [found.keys[i] for i in order],
                "concepts": [found.concepts[i] for i in order],
                "captions": None if found.texts is None else [found.texts[i] for i in order],
                "targets": [found.targets[i] for i in order],
            }
        items = self.prompts.samples if images != GALLERY else [i for i in self.prompts.dataset.items if i.image]
        captioned = all(item.captions for item in items)
        return {
            "keys": [item.key for item in items],
            "concepts": [item.concept or item.key for item in items],
            "captions": [item.captions[0] for item in items] if captioned else None,
            "targets": [item.targets for item in items],
        }

    @property
    def generates(self) -> bool:
        """Whether generated images are needed."""
        measured = {STORED_AS.get(images, images) for _, sets in self.plan for images in sets}
        return "generated" in measured or bool(self.stores["generated"].extractors)

    def paired_places(self) -> list[int]:
        """Returns for every prompt the index of its real image among the samples."""
        places = {item.key: number for number, item in enumerate(self.prompts.samples)}
        return [places[key] for key in self.generated.keys if key in places]

    @property
    def reference_size(self) -> int | None:
        """Number of real images that metrics compare with; None if it is unknown."""
        if isinstance(self.reference, StoredReference):
            return self.reference.saved.count
        return len(self.reference.source)

    def record(self) -> dict[str, Any]:
        """Returns the entry of the group in the result file."""
        prompts, generated, stored = self.prompts, self.generated, {}
        if isinstance(self.reference, StoredReference):
            saved = self.reference.saved
            stored = {"name": f"statistics:{saved.name}", "sha256": saved.sha256, "items": saved.count}
        return {
            "samples": self.reference_size,
            "captions": len(generated.keys) if self.generates else 0,
            "expected_captions": prompts.expected,
            "keys_sha256": digest([item.key for item in prompts.samples]),
            "captions_sha256": prompts.captions.sha256 if prompts.captions is not None else None,
            "dataset": {
                "name": prompts.dataset.name,
                "sha256": prompts.sha256,
                "items": len(prompts.dataset.items),
                **prompts.dataset.left_out(),
                "excluded": sum(item.key in prompts.excluded for item in prompts.dataset.items),
                "exclusions_sha256": digest(sorted(prompts.excluded)) if prompts.excluded else None,
                **stored,
            },
        }
