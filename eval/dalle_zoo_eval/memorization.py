"""Searches copies of training images, and overlaps of datasets, by nearest neighbors in the features of a network.

For every image of one set, the most similar image of another set is found by cosine similarity of features. Comparing
generated images with training images finds copies. Comparing a dataset with training images gives the exclusion list
of the deduplicated protocols; section 3.1 of the paper removes overlapping images in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.files import atomic_write, check_ending
from dalle_zoo.images import save_png
from dalle_zoo.sharing import Share
from dalle_zoo_eval.datasets import read_dataset
from dalle_zoo_eval.datasets.digests import MEMO, remember
from dalle_zoo_eval.features import FeatureStore
from dalle_zoo_eval.image_sources import ImageFiles
from dalle_zoo_eval.metrics.estimates import bootstrapped
from dalle_zoo_eval.metrics.frechet import FID_FAMILIES
from dalle_zoo_eval.moments import in_batches, regrouped
from dalle_zoo_eval.opening import open_extractor
from dalle_zoo_eval.protocol import find_protocol
from dalle_zoo_eval.rules import ImageRule
from dalle_zoo_eval.sheets import comparison_sheet
from dalle_zoo_eval.training_images import UNREADABLE, TrainingImages

# Q query images, G gallery images, d features

INCEPTION = FID_FAMILIES[0]
"""Default extractor for the search."""
GALLERY = 32768
"""Number of gallery images compared at once, which bounds memory."""
NEAREST = "right its nearest training image, cosine below"
"""End of the titles of sheets."""
PAIRS = 24
"""Number of pairs on a sheet."""
SIDE = 128
"""Side of an image on a sheet, pixels."""


@dataclass(frozen=True)
class Neighbors:
    """The most similar gallery image of every query image."""

    similarity: Tensor
    """Cosine similarity, float32 (Q,)."""
    index: Tensor
    """Index in the gallery, int64 (Q,)."""

    def record(self, threshold: float) -> dict[str, Any]:
        """Returns the share above a threshold with its bootstrap interval over images, and the median."""
        share, low, high = bootstrapped(self.similarity >= threshold)
        return {
            "share_above": share, "interval": [low, high], "median_similarity": float(self.similarity.median())
        }  # fmt: skip

    def closest(self, count: int) -> list[int]:
        """Returns the indices of the images with the most similar neighbors, most similar first."""
        return self.similarity.argsort(descending=True, stable=True)[:count].tolist()


def nearest(features: Tensor, gallery: Iterable[Tensor], *, batch_size: int = 1024) -> Neighbors:
    """Finds the most similar gallery image of every query image.

    Args:
        features: Features of the query images, (Q, d).
        gallery: Features of the gallery images, (G, d) in parts. Rows with NaN or infinity are ignored.
        batch_size: Number of query images compared at once, which affects memory but not the result. Defaults to 1024.

    Raises:
        ValueError: One of the sets is empty, or their features have different lengths.
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


def pair_sheet(found: Neighbors, images: Sequence[Tensor], gallery: Sequence[Tensor], *, title: str) -> Image.Image:
    """Renders the closest pairs, most similar first: query image left, neighbor right, cosine similarity below.

    Args:
        found: Neighbors of all query images.
        images: The closest query images, uint8 (3, H, W), in the order of `Neighbors.closest`.
        gallery: Neighbors of these images, uint8 (3, H, W).
        title: Line above the pairs.

    Returns:
        An RGB image.
    """
    closest = found.closest(len(images))
    captions = [f"{float(found.similarity[i]):.3f}" for i in closest]
    sides = [torch.stack([_square(image) for image in images]) for images in (images, gallery)]
    return comparison_sheet(*sides, captions=captions, scale=1, title=title)


def _square(image: Tensor) -> Tensor:
    scaled = F.interpolate(image[None].float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
    return scaled[0].clamp(0, 1)


def write_exclusions(found: Neighbors, keys: Sequence[str], threshold: float, path: Path, *, note: str) -> int:
    """Writes the keys of the images whose neighbor reaches a threshold, one per line.

    Args:
        found: Neighbors of the dataset's images in the training set.
        keys: Keys of the dataset's images.
        threshold: Minimum cosine similarity of an overlap.
        path: File to write; an existing file is replaced.
        note: Origin of the list, written as a comment on the first line.

    Returns:
        The number of keys.
    """
    over = [key for key, value in zip(keys, found.similarity.tolist(), strict=True) if value >= threshold]
    with atomic_write(path) as aside:
        aside.write_text("\n".join([f"# {note}", *over]) + "\n", encoding="utf-8")
    return len(over)


def check_threshold(threshold: float) -> None:
    """Raises `ValueError` unless a threshold is in -1..1."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"--threshold must be a cosine, -1 to 1, got {threshold}")


def open_training(location: str, image: ImageRule) -> TrainingImages:
    """Opens training images, cropped and scaled like the images of a protocol.

    Args:
        location: Training images: folder, shards, or a pattern of shards.
        image: Crop and size of the real images of the protocol.

    Raises:
        ValueError: The protocol states no size, or the location has no images.
    """
    if image.size is None:
        raise ValueError("training images are compared at the size of the protocol, and image.size is null")
    return TrainingImages(location, image.external_crop, image.size)


def copies_network(networks: Collection[str], name: str | None = None) -> str:
    """Returns the name of the extractor that searches for copies.

    Args:
        networks: Names of the extractors of an evaluation.
        name: The name that was asked for. Defaults to `INCEPTION` if it is available, or else to the first.

    Raises:
        ValueError: There is no such extractor.
    """
    if name is not None and name not in networks:
        raise ValueError(f"--copies-network {name}: the networks of this evaluation are {', '.join(networks)}")
    return name or (INCEPTION if INCEPTION in networks else next(iter(networks)))


def find_copies(
    generated: FeatureStore,
    reference: FeatureStore | None,
    known: FeatureStore,
    *,
    keys: Sequence[str],
    threshold: float,
    sheet: Path,
) -> dict[str, Any]:
    """Compares generated and reference images with training images, and writes a sheet of the closest pairs.

    The reference shows what to expect without copies: many networks find all images of a kind similar.

    Args:
        generated: Features of the generated images.
        reference: Features of the reference images; None if the extractor's features of them are not stored.
        known: Features of the training images.
        keys: Names of the generated images.
        threshold: Minimum cosine similarity of a copy.
        sheet: PNG file to write.

    Returns:
        Entry ``memorization`` of the result file.
    """
    (name,) = known.extractors
    found = nearest(generated.all(name, f"0/{generated.counts[-1]}/features"), _readable(known, name))
    closest = found.closest(PAIRS)
    neighbors = [int(found.index[i]) for i in closest]
    pairs = pair_sheet(found, generated.images(closest), known.images(neighbors), title=f"left generated, {NEAREST}")
    save_png(pairs, sheet)
    assert isinstance(known.source, TrainingImages)
    overlap = None
    if reference is not None:
        overlap = nearest(reference.all(name, "0/1/features"), _readable(known, name)).record(threshold)
    return {
        "network": name,
        "network_sha256": known.extractors[name].record["sha256"],
        "training": known.source.name,
        "training_sha256": _sha256(known),
        "training_images": len(known.source),
        "unreadable": _unreadable(known, name),
        "threshold": threshold,
        **found.record(threshold),
        "reference": overlap,
        "closest": [
            {"sample": keys[i], "training": known.source.key(j), "similarity": float(found.similarity[i])}
            for i, j in zip(closest, neighbors, strict=True)
        ],
    }


def _readable(known: FeatureStore, network: str) -> Iterator[Tensor]:
    """Yields features of training images; NaN for images that could not be read."""
    parts = zip(known.read(network, "0/1/features"), known.read(network, "chosen/1"), strict=True)
    for features, chosen in parts:
        yield torch.where(chosen[:, None] == UNREADABLE, torch.nan, features)


def _sha256(known: FeatureStore) -> str:
    """Returns a digest of the names and sizes of the training files; reading their contents would take too long."""
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
    """Writes the list of dataset images that are also in a training set, and a sheet of the closest pairs.

    Args:
        protocol: Protocol that states the dataset and the crop of its images.
        data: Folder of the dataset.
        layout: Layout of the dataset. None selects the first layout of the protocol.
        training: Training images: folder, shards, or a pattern of shards.
        network: Name and location of the extractor that compares.
        threshold: Minimum cosine similarity of an overlap.
        out: File of the list (``.txt``); features are stored next to it in ``.cache``.
        device: Device of the extractor. Defaults to ``cpu``.
        share: Part of the work with which this process begins. Defaults to all of it.

    Returns:
        Number of images on the list, and of all images; None in every process but the first.

    Raises:
        ValueError: The protocol has several groups, or an argument is wrong.
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
    queries = FeatureStore(images, networks, (0,), chunk, cache, device)
    known = FeatureStore(open_training(training, rules.image), networks, (0,), chunk, cache, device)
    remember(side.image_files, cache / MEMO)
    queries.run(share, label="dataset")
    known.run(share, label="training images")
    if share.rank != 0:
        return None
    found = nearest(queries.all(name, "0/1/features"), _readable(known, name))
    closest = found.closest(PAIRS)
    neighbors = known.images(found.index[closest].tolist())
    pairs = pair_sheet(found, queries.images(closest), neighbors, title=f"left {side.name}, {NEAREST}")
    save_png(pairs, out.with_suffix(".png"))
    assert isinstance(known.source, TrainingImages)
    note = (
        f"{side.name} (sha256 {source}) in {known.source.name}, a training set of {len(known.source)} images "
        f"(sha256 of names and sizes {_sha256(known)}), {name} (sha256 {networks[name].record['sha256']}) cosine at "
        f"least {threshold}"
    )
    return write_exclusions(found, [item.key for item in items], threshold, out, note=note), len(items)
