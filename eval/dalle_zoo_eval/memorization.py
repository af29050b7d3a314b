"""Has a model copied? And do two sets of images overlap? The nearest image by the features of a network.

Both questions have one answer: for every image of one set the most similar one of another, by the cosine between
features. A model's images are compared with its training images; a training set is compared with a dataset to make
the exclusion list of the de-duplicated protocols (section 3.1 of the paper removes overlapping images the same way).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.files import atomic_write, check_ending
from dalle_zoo.images import save_png
from dalle_zoo_eval.datasets import read_dataset
from dalle_zoo_eval.datasets.digests import MEMO, remember
from dalle_zoo_eval.extractors import Extractor
from dalle_zoo_eval.features import FeatureStore, Share
from dalle_zoo_eval.image_sources import ImageFiles
from dalle_zoo_eval.metrics.frechet import FID_FAMILIES
from dalle_zoo_eval.moments import in_batches, regrouped
from dalle_zoo_eval.opening import open_extractor
from dalle_zoo_eval.protocol import find_protocol
from dalle_zoo_eval.rules import ImageRule
from dalle_zoo_eval.sheets import comparison_sheet
from dalle_zoo_eval.training_images import UNREADABLE, TrainingImages

# Q query images, G gallery, d features

INCEPTION = FID_FAMILIES[0]
"""Extractor that searches for copies unless another is named."""
GALLERY = 32768
"""Gallery images compared at once: memory does not grow with the gallery."""
PAIRS = 24
"""Pairs on a sheet."""
SIDE = 128
"""Side of an image on a sheet, pixels."""


@dataclass(frozen=True)
class Neighbors:
    """The most similar image of the gallery for every image of a set."""

    similarity: Tensor
    """Cosine, float32 (Q,)."""
    index: Tensor
    """Its place in the gallery, int64 (Q,)."""

    def share_above(self, threshold: float) -> float:
        """Share of images whose nearest one is at least so similar."""
        return float((self.similarity >= threshold).double().mean())

    def closest(self, count: int) -> list[int]:
        """The images with the most similar neighbors, most similar first."""
        return self.similarity.argsort(descending=True, stable=True)[:count].tolist()


def nearest(features: Tensor, gallery: Iterable[Tensor], *, batch_size: int = 1024) -> Neighbors:
    """Finds the most similar gallery image of every image.

    Args:
        features: (Q, d).
        gallery: (G, d) in parts; a row that is not finite is never the nearest.
        batch_size: Images compared at once; memory, not the result.

    Raises:
        ValueError: One of the two is empty, or they are of different networks.
    """
    similarity, index = torch.full((len(features),), -2.0), torch.zeros(len(features), dtype=torch.long)
    total = 0
    if not len(features):
        raise ValueError("both sets must hold images, got 0 query images")
    for (part,) in regrouped(zip(gallery), GALLERY):
        if features.shape[1] != part.shape[1]:
            raise ValueError(f"features must be of one network, got {features.shape[1]} and {part.shape[1]} numbers")
        known = F.normalize(part.float(), dim=1).t()
        cosines = ((F.normalize(some.float(), dim=1) @ known) for some in in_batches(features, batch_size))
        best = [cosine.nan_to_num(-2).max(1) for cosine in cosines]
        values, places = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
        nearer = values > similarity
        similarity, index = torch.where(nearer, values, similarity), torch.where(nearer, places + total, index)
        total += len(part)
    if not total:
        raise ValueError("both sets must hold images, got an empty gallery")
    return Neighbors(similarity, index)


def pair_sheet(found: Neighbors, images: Sequence[Tensor], gallery: Sequence[Tensor]) -> Image.Image:
    """The closest pairs, most similar first: the asked image left, its neighbor right, the cosine below.

    Args:
        found: Neighbors of all images.
        images: The closest images, uint8 (3, H, W), in the order of `Neighbors.closest`.
        gallery: Their neighbors.
    """
    closest = found.closest(len(images))
    captions = [f"{float(found.similarity[i]):.3f}" for i in closest]
    sides = [torch.stack([_square(image) for image in images]) for images in (images, gallery)]
    return comparison_sheet(*sides, captions=captions, scale=1)


def _square(image: Tensor) -> Tensor:
    scaled = F.interpolate(image[None].float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
    return scaled[0].clamp(0, 1)


def write_exclusions(found: Neighbors, keys: Sequence[str], threshold: float, path: Path, *, note: str) -> int:
    """Writes the keys of the images whose neighbor is at least so similar, one per line.

    Args:
        found: Neighbors of the dataset's images in the training set.
        keys: Keys of the dataset's images.
        threshold: Least cosine of an overlap.
        path: The list, replaced.
        note: Where it comes from, for the comment at its head.

    Returns:
        The number of keys.
    """
    over = [key for key, value in zip(keys, found.similarity.tolist(), strict=True) if value >= threshold]
    with atomic_write(path) as aside:
        aside.write_text("\n".join([f"# {note}", *over]) + "\n", encoding="utf-8")
    return len(over)


def check_threshold(threshold: float) -> None:
    """Raises `ValueError` unless a threshold is a cosine."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"--threshold must be a cosine, -1 to 1, got {threshold}")


def measured_training(
    location: str,
    image: ImageRule,
    networks: Mapping[str, Extractor],
    chunk: int,
    cache: Path,
    device: str = "cpu",
    network: str | None = None,
) -> FeatureStore:
    """Training images, to be measured by the network that compares them.

    Args:
        location: Folder, shards, or a pattern of shards.
        image: How the real images are cropped and scaled.
        networks: Networks by name.
        chunk: Images that are measured together.
        cache: Folder of measured chunks.
        device: Where the network computes.
        network: Name of the extractor that compares. Defaults to Inception, or else the first one.

    Raises:
        ValueError: There is no such network.
    """
    name = network or (INCEPTION if INCEPTION in networks else next(iter(networks)))
    if name not in networks:
        raise ValueError(f"--copies-network {name}: the networks of this evaluation are {', '.join(networks)}")
    if image.size is None:
        raise ValueError("training images are compared at the size of the protocol, and image.size is null")
    images = TrainingImages(location, image.external_crop, image.size)
    return FeatureStore(images, {name: networks[name]}, (0,), chunk, cache, device)


def find_copies(generated: FeatureStore, known: FeatureStore, *, threshold: float, sheet: Path) -> dict[str, Any]:
    """Compares generated images with training images, and renders the sheet of the closest pairs.

    Args:
        generated: Features of the generated images.
        known: Those of the training images, from `measured_training`.
        threshold: Cosine from which an image counts as a copy.
        sheet: PNG file.

    Returns:
        What the result file says of it.
    """
    check_threshold(threshold)
    (name,) = known.extractors
    found = nearest(generated.all(name, f"0/{generated.counts[-1]}/features"), _readable(known, name))
    closest = found.closest(PAIRS)
    neighbors = [int(found.index[i]) for i in closest]
    save_png(pair_sheet(found, generated.images(closest), known.images(neighbors)), sheet)
    assert isinstance(known.source, TrainingImages)
    return {
        "network": name,
        "network_sha256": known.extractors[name].record["sha256"],
        "training": known.source.name,
        "training_sha256": _sha256(known),
        "training_images": len(known.source),
        "unreadable": _unreadable(known, name),
        "threshold": threshold,
        "share_above": found.share_above(threshold),
        "median_similarity": float(found.similarity.median()),
        "closest": [
            {"sample": i, "training": known.source.key(j), "similarity": float(found.similarity[i])}
            for i, j in zip(closest, neighbors, strict=True)
        ],
    }


def _readable(known: FeatureStore, network: str) -> Iterator[Tensor]:
    """Features of training images; not finite where an image could not be read."""
    parts = zip(known.read(network, "0/1/features"), known.read(network, "chosen/1"), strict=True)
    for features, chosen in parts:
        yield torch.where(chosen[:, None] == UNREADABLE, torch.nan, features)


def _sha256(known: FeatureStore) -> str:
    """Digest of the names and sizes of the files of a training set; their contents would take long to read."""
    return str(known.source.identity["source"])


def _unreadable(known: FeatureStore, network: str) -> int:
    return int((known.all(network, "chosen/1") == UNREADABLE).sum())


def find_overlaps(
    protocol: str,
    data: Path,
    layout: str | None,
    training: str,
    network: tuple[str, Path],
    threshold: float,
    out: Path,
    device: str = "cpu",
    share: Share | None = None,
) -> tuple[int, int] | None:
    """Writes the list of a dataset's images that are in a training set too, and the sheet of the closest pairs.

    Args:
        protocol: States the dataset, and how its images are cropped.
        data: Folder of the dataset.
        layout: Its layout. Defaults to the protocol's usual one.
        training: Training images: folder, shards, or a pattern of shards.
        network: Name and location of the network that compares.
        threshold: Cosine from which images overlap.
        out: The list; features are stored next to it in ``.cache``.
        device: Where the network computes.
        share: Which part of the work this process begins with. Defaults to all of it.

    Returns:
        Images on the list, and images in all; None in a process other than the first.
    """
    check_threshold(threshold)
    check_ending("--out", out, (".txt",))
    rules = find_protocol(protocol)
    if len(rules.groups) != 1:
        raise ValueError(f"{protocol} has several groups; overlaps are searched for a protocol with one dataset")
    ((group_name, group),) = rules.groups.items()
    layout, share = layout or group.layout, share or Share()
    name, location = network
    networks = {name: open_extractor(rules, name, location, device=device)}
    side = read_dataset(layout, data, rules.split(group_name, layout))
    items = [item for item in side.items if item.image is not None]
    cache, chunk = out.parent / ".cache", rules.image.chunk or rules.sampling.chunk
    source = side.sha256(cache / MEMO)
    images = ImageFiles(items, rules.image.crop, rules.image.size, source=source)
    asked = FeatureStore(images, networks, (0,), chunk, cache, device)
    known = measured_training(training, rules.image, networks, chunk, cache, device)
    remember(side.image_files, cache / MEMO)
    asked.run(share, label="dataset")
    known.run(share, label="training images")
    if share.rank != 0:
        return None
    found = nearest(asked.all(name, "0/1/features"), _readable(known, name))
    closest = found.closest(PAIRS)
    save_png(
        pair_sheet(found, asked.images(closest), known.images(found.index[closest].tolist())),
        out.with_suffix(".png"),
    )
    assert isinstance(known.source, TrainingImages)
    note = (
        f"{side.name} (sha256 {source}) in {known.source.name}, a training set of {len(known.source)} images "
        f"(sha256 of names and sizes {_sha256(known)}), {name} (sha256 {networks[name].record['sha256']}) cosine at "
        f"least {threshold}"
    )
    return write_exclusions(found, [item.key for item in items], threshold, out, note=note), len(items)
