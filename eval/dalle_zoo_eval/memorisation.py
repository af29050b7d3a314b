"""Has a model copied? And do two sets of pictures overlap? The nearest picture by the features of a network.

Both questions have one answer: for every picture of one set the most similar one of another, by the cosine between
features. A model's pictures are held against its training pictures; a training set is held against a benchmark to make
the exclusion list of the de-duplicated protocols (section 3.1 of the paper removes overlapping pictures the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dalle_zoo.files import check_ending, written_aside
from dalle_zoo.pictures import save_png
from dalle_zoo_eval.benchmarks import read_benchmark
from dalle_zoo_eval.judges import open_network
from dalle_zoo_eval.measuring import Measurement, Share
from dalle_zoo_eval.metrics import in_batches
from dalle_zoo_eval.protocol import PictureRule, find_protocol, foreign_crop
from dalle_zoo_eval.scoring import INCEPTION
from dalle_zoo_eval.sheets import comparison_sheet
from dalle_zoo_eval.subjects import ReadPictures

# Q pictures that are asked for, G gallery, d features

GALLERY = 32768
"""Gallery pictures compared at once: memory does not grow with the gallery."""
PAIRS = 24
"""Pairs on a sheet."""
SIDE = 128
"""Side of a picture on a sheet, pixels."""


@dataclass(frozen=True)
class Neighbours:
    """The most similar picture of the gallery for every picture of a set."""

    similarity: Tensor
    """Cosine, float32 (Q,)."""
    index: Tensor
    """Its place in the gallery, int64 (Q,)."""

    def share_above(self, threshold: float) -> float:
        """Share of pictures whose nearest one is at least so similar."""
        return float((self.similarity >= threshold).double().mean())

    def closest(self, count: int) -> list[int]:
        """The pictures with the most similar neighbours, most similar first."""
        return self.similarity.argsort(descending=True, stable=True)[:count].tolist()


def nearest(features: Tensor, gallery: Tensor, *, batch_size: int = 1024) -> Neighbours:
    """Finds the most similar gallery picture of every picture.

    Args:
        features: (Q, d).
        gallery: (G, d).
        batch_size: Pictures compared at once; memory, not the result.

    Raises:
        ValueError: One of the two is empty, or they are of different networks.
    """
    if not len(features) or not len(gallery):
        raise ValueError(f"both sets must hold pictures, got {len(features)} and {len(gallery)}")
    if features.shape[1] != gallery.shape[1]:
        raise ValueError(f"features must be of one network, got {features.shape[1]} and {gallery.shape[1]} numbers")
    similarity, index = torch.full((len(features),), -2.0), torch.zeros(len(features), dtype=torch.long)
    for start in range(0, len(gallery), GALLERY):
        known = F.normalize(gallery[start : start + GALLERY].float(), dim=1)
        best = [(F.normalize(part.float(), dim=1) @ known.t()).max(1) for part in in_batches(features, batch_size)]
        values, places = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
        nearer = values > similarity
        similarity, index = torch.where(nearer, values, similarity), torch.where(nearer, places + start, index)
    return Neighbours(similarity, index)


def pair_sheet(found: Neighbours, pictures: Sequence[Tensor], gallery: Sequence[Tensor]) -> Image.Image:
    """The closest pairs, most similar first: the asked picture left, its neighbour right, the cosine below.

    Args:
        found: Neighbours of all pictures.
        pictures: The closest pictures, uint8 (3, H, W), in the order of `Neighbours.closest`.
        gallery: Their neighbours.
    """
    closest = found.closest(len(pictures))
    captions = [f"{float(found.similarity[i]):.3f}" for i in closest]
    sides = [torch.stack([_square(image) for image in images]) for images in (pictures, gallery)]
    return comparison_sheet(*sides, captions=captions, scale=1)


def _square(image: Tensor) -> Tensor:
    scaled = F.interpolate(image[None].float() / 255, (SIDE, SIDE), mode="bilinear", antialias=True)
    return scaled[0].clamp(0, 1)


def write_exclusions(found: Neighbours, keys: Sequence[str], threshold: float, path: Path, *, note: str) -> int:
    """Writes the keys of the pictures whose neighbour is at least so similar, one a line.

    Args:
        found: Neighbours of the benchmark's pictures in the training set.
        keys: Keys of the benchmark's pictures.
        threshold: Least cosine of an overlap.
        path: The list, replaced.
        note: Where it comes from, for the comment at its head.

    Returns:
        The number of keys.
    """
    over = [key for key, value in zip(keys, found.similarity.tolist(), strict=True) if value >= threshold]
    with written_aside(path) as aside:
        aside.write_text("\n".join([f"# {note}", *over]) + "\n", encoding="utf-8")
    return len(over)


def check_threshold(threshold: float) -> None:
    """Raises `ValueError` unless a threshold is a cosine."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"--threshold must be a cosine, -1 to 1, got {threshold}")


def find_copies(
    drawn: Measurement, training: Path, picture: PictureRule, *, threshold: float, sheet: Path
) -> dict[str, Any]:
    """Holds judged pictures against training pictures, and draws the sheet of the closest pairs.

    Args:
        drawn: Features of the judged pictures; of its networks Inception compares, or else the first one.
        training: Folder of training pictures.
        picture: How they are cut and scaled.
        threshold: Cosine from which a picture counts as a copy.
        sheet: PNG file.

    Returns:
        What the result file says of it.
    """
    check_threshold(threshold)
    name = INCEPTION if INCEPTION in drawn.networks else next(iter(drawn.networks))
    folder = read_benchmark("folder", training, "all")
    known_pictures = ReadPictures(folder.items, foreign_crop(picture), picture.size, source=folder.sha256())
    known = Measurement(known_pictures, {name: drawn.networks[name]}, (0,), drawn.chunk, drawn.cache)
    known.run(Share(), label="training pictures")
    found = nearest(drawn.all(name, f"0/{drawn.counts[-1]}/features"), known.all(name, "0/1/features"))
    closest = found.closest(PAIRS)
    neighbours = [int(found.index[i]) for i in closest]
    save_png(pair_sheet(found, drawn.pictures(closest), known.pictures(neighbours)), sheet)
    return {
        "network": name,
        "training_pictures": len(known_pictures),
        "threshold": threshold,
        "share_above": found.share_above(threshold),
        "median_similarity": float(found.similarity.median()),
        "closest": [
            {"sample": i, "training": folder.items[j].key, "similarity": float(found.similarity[i])}
            for i, j in zip(closest, neighbours, strict=True)
        ],
    }


def find_overlaps(
    protocol: str,
    data: Path,
    layout: str | None,
    training: Path,
    network: tuple[str, Path],
    threshold: float,
    out: Path,
    device: str = "cpu",
) -> tuple[int, int]:
    """Writes the list of a benchmark's pictures that are in a training set too, and the sheet of the closest pairs.

    Args:
        protocol: Whose benchmark is meant, and how its pictures are cut.
        data: Folder of the benchmark.
        layout: Its layout; the protocol's usual one if missing.
        training: Folder of training pictures.
        network: Name and location of the network that compares.
        threshold: Cosine from which pictures overlap.
        out: The list; features are kept beside it in ``.cache``.
        device: Where the network computes.

    Returns:
        Pictures on the list, and pictures in all.
    """
    check_threshold(threshold)
    check_ending("--out", out, (".txt",))
    rules = find_protocol(protocol)
    layout = layout or rules.layout
    picture = rules.picture
    name, location = network
    net = open_network(rules, name, location, device=device)
    sides = [read_benchmark(layout, data, rules.split(layout)), read_benchmark("folder", training, "all")]
    crops = [picture.crop, foreign_crop(picture)]
    subjects = [
        ReadPictures([i for i in side.items if i.image], crop, picture.size, source=side.sha256())
        for side, crop in zip(sides, crops, strict=True)
    ]
    cache, chunk = out.parent / ".cache", rules.sampling.chunk
    measured = [Measurement(subject, {name: net}, (0,), chunk, cache) for subject in subjects]
    for label, measurement in zip(("benchmark", "training pictures"), measured, strict=True):
        measurement.run(Share(), label=label)
    found = nearest(*(measurement.all(name, "0/1/features") for measurement in measured))
    closest = found.closest(PAIRS)
    pairs = measured[0].pictures(closest), measured[1].pictures(found.index[closest].tolist())
    save_png(pair_sheet(found, *pairs), out.with_suffix(".png"))
    keys = [item.key for item in subjects[0].items]
    note = f"{sides[0].name} in a training set of {len(subjects[1])} pictures, {name} cosine at least {threshold}"
    return write_exclusions(found, keys, threshold, out, note=note), len(keys)
